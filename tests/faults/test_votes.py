"""What fails on one rank alone is told to all: nothing changes anywhere, and the next interval works."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from unittest import mock

import pytest
import torch

from eplb_plugin.runtime import rebalance as phases
from eplb_plugin.runtime import repair
from eplb_plugin.runtime.control.rank_group import RankGroup
from eplb_plugin.runtime.load_window import IntervalLoad, LoadWindow
from eplb_plugin.runtime.verify.fingerprints import ExpertFingerprints
from eplb_plugin.runtime.weights import transfer
from eplb_plugin.runtime.weights.staging import Staging
from tests.faults.cluster import Seat, run_cluster
from tests.faults.serving import MOST, SIZE, Service
from tests.faults.table import Record

Patch = Callable[[], AbstractContextManager[object]]


def raising(owner: object, name: str, error: Exception) -> Patch:
    return lambda: mock.patch.object(owner, name, side_effect=error)


def garbled_plan() -> AbstractContextManager[object]:
    received = RankGroup.broadcast

    def broadcast(self: RankGroup, tensor: torch.Tensor, source: int = 0) -> torch.Tensor:
        return received(self, tensor, source).flip(1)

    return mock.patch.object(RankGroup, "broadcast", broadcast)


def garbled_load(garble: Callable[[torch.Tensor], torch.Tensor]) -> Patch:
    taken = LoadWindow.take

    def garbled(window: LoadWindow) -> IntervalLoad:
        load = taken(window)
        return load._replace(snapshots=garble(load.snapshots))

    return lambda: mock.patch.object(LoadWindow, "take", garbled)


# What happens, where it is found, and what all ranks are told about it.
FAULTS: dict[str, tuple[str, Patch, str]] = {
    "another plan": ("agree", garbled_plan, "ranks disagree on the plan"),
    "no staging memory": (
        "stage",
        raising(Staging, "reserve", MemoryError("no memory today")),
        "MemoryError: no memory today",
    ),
    "weights that cannot be read": (
        "stage",
        raising(transfer, "_copy", OSError("no weights today")),
        "OSError: no weights today",
    ),
    "fingerprints that fail": (
        "verify",
        raising(ExpertFingerprints, "wrong_slots", ValueError("no fingerprints today")),
        "ValueError: no fingerprints today",
    ),
    "a load of NaN": (
        "gather",
        garbled_load(lambda load: load.double() * float("nan")),
        "LoadError: the recorded load is torch.float64",
    ),
    "a negative load": (
        "gather",
        garbled_load(lambda load: load - 10**6),
        "LoadError: the recorded load holds -",
    ),
    "a load of another shape": (
        "gather",
        garbled_load(lambda load: load[:, :, :-1]),
        r"LoadError: the recorded load is torch.int64",
    ),
    "a load of no shape": (
        "gather",
        garbled_load(lambda load: load.sum()),
        r"LoadError: the recorded load is torch.int64",
    ),
    "a load of fewer snapshots": (
        "gather",
        garbled_load(lambda load: load[:-1]),
        "different numbers of steps",
    ),
}
PLANNER_FAULTS: dict[str, tuple[str, Patch, str]] = {
    "a planner that raises": (
        "plan",
        raising(phases, "plan", ValueError("no plan today")),
        "ValueError: no plan today",
    )
}


def fail_and_go_on(
    seat: Seat, mode: str, victims: list[int], faults: list[str], planning: str
) -> dict[tuple[str, int], float]:
    """Seconds from the report of each fault on each victim to one that moved experts again."""
    # Every rebalance verifies every layer.
    repair.AUDIT_TURNS = 1
    service = Service(seat, mode=mode, planning=planning)
    service.serve(1)
    seconds = {}
    for name in faults:
        _, patch, told = (FAULTS | PLANNER_FAULTS)[name]
        for victim in victims:
            with patch() if seat.rank == victim else nullcontext():
                # A rebalance in which the victim has nothing to do may get past the fault.
                for _ in range(MOST):
                    before = service.balancer.placement
                    *earlier, report = service.serve(1)
                    if report.failed:
                        break
            assert told in report.reason, report
            assert report.skipped
            assert report.moves == report.layers == 0
            assert report.failed
            # Where two have ended, the earlier one may have got past the fault.
            assert service.balancer.placement == before or any(other.layers for other in earlier)
            start = time.monotonic()
            report = service.until(lambda report: report.moves > 0)
            assert not report.failed
            seconds[name, victim] = time.monotonic() - start
    assert not service.balancer.off
    # The first failure is logged, the others are in the reports.
    assert len(seat.logged) == 1
    return seconds


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize(
    ("planning", "victims", "faults"),
    [
        ("leader", [0, 1], list(FAULTS)),
        ("leader", [0], list(PLANNER_FAULTS)),
        ("sharded", [0, 1], list(PLANNER_FAULTS)),
    ],
    ids=["all", "planner", "planner-sharded"],
)
def test_a_failure_changes_nothing_and_ends_nothing(
    mode: str, planning: str, victims: list[int], faults: list[str], record: Record
) -> None:
    ranks = run_cluster(fail_and_go_on, SIZE, mode, victims, faults, planning)
    for name, victim in ranks[0]:
        where, _, _ = (FAULTS | PLANNER_FAULTS)[name]
        record(
            f"{name} on rank {victim}" + (" of ranks that all plan" if planning == "sharded" else ""),
            mode,
            f"found in {where}",
            placement=True,
            outputs=True,
            seconds=max(seconds[name, victim] for seconds in ranks),
            after="on",
        )
