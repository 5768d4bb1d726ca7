"""A rebalance with every step, in small pieces, while the model serves: outputs are those of one process."""

from __future__ import annotations

from unittest import mock

import pytest

from eplb_plugin.runtime.control.two_phase_commit import DecisionStore
from tests.faults.cluster import Seat, run_cluster
from tests.faults.serving import SMALL, Service

# An expert takes 0.4 MiB, so that a layer does not fit into a MiB of staging memory.
LARGE = SMALL.model_copy(update={"hidden": 128, "expert_hidden": 256})
STEPS = 40
REBALANCES = 3  # in the background, however many steps these take
MOST = 400  # steps


def rebalance_in_every_step(
    seat: Seat, mode: str, commit_layers: int, large: bool, slots_per_rank: int
) -> tuple[int, int, int]:
    """(rebalances, moves, commits that were decided)."""
    decided = []
    decide = DecisionStore.decide

    def count(self: DecisionStore, key: str, proposal: str) -> str:
        decided.append(key)
        return decide(self, key, proposal)

    with mock.patch.object(DecisionStore, "decide", count):
        service = Service(
            seat,
            LARGE if large else SMALL,
            slots_per_rank,
            mode=mode,
            interval=1,
            commit_layers=commit_layers,
            staging_mib=1,
        )
        rebalances = moves = 0
        for step in range(MOST):
            if step >= STEPS and rebalances >= REBALANCES:
                break
            report = service.step(topic=step // 3)
            if report is None:
                continue
            assert not report.failed, report.reason
            assert report.mismatches == 0
            rebalances += 1
            moves += report.moves
        service.balancer.close()
        service.check_weights()
        service.check_tables()
    assert not seat.logged
    return rebalances, moves, len(decided)


@pytest.mark.parametrize(
    ("commit_layers", "large"), [(8, False), (1, True)], ids=["small-all-at-once", "large-one-by-one"]
)
@pytest.mark.parametrize(("size", "slots_per_rank"), [(2, 9), (4, 5)], ids=["2", "4"])
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_outputs_in_every_step(
    mode: str, size: int, slots_per_rank: int, commit_layers: int, large: bool
) -> None:
    ranks = run_cluster(rebalance_in_every_step, size, mode, commit_layers, large, slots_per_rank)
    assert all(rank == ranks[0] for rank in ranks)
    rebalances, moves, decided = ranks[0]
    # In the background every migration batch waits for a step of all ranks.
    assert rebalances == STEPS if mode == "sync" else rebalances >= REBALANCES
    assert moves > rebalances / 2
    # A rebalance that moves little fits at once, but by far not all do. The last one ends without a report.
    assert decided > 1.5 * rebalances if large else decided <= rebalances + 1
