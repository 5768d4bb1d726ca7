"""Trial of one setting on one load: balancedness and moves; and a folder as the cache of trials."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from ..config.options import PlannerOptions, RebalancerOptions
from ..core.errors import TraceError
from ..core.placement import Placement
from ..core.safe_files import written_whole
from ..core.topology import Topology
from ..offline.simulation import PolicySetup, policy_setup, simulate
from ..offline.traces import LoadTrace
from ..runtime.weights.migration import plan_migration

__all__ = ["Setting", "Trial", "TrialCache", "try_setting"]

_RUN_BY_TRIALS = ("advisor", "core", "offline", "planning", "runtime/weights")


@dataclass(frozen=True)
class Setting:
    """The choices of an operator.

    Attributes:
        slots: physical experts over all ranks.
        interval: steps between two rebalances.
        move_price: `planner.move_price`.
    """

    slots: int
    interval: int
    move_price: float


class Trial(BaseModel):
    """The result of a setting. Transfers are counted in experts: the cache serves experts of any size."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    balancedness: float
    """Mean over the steps after the first interval."""

    rebalances: int
    """Number of rebalances."""

    first_moves: int
    """Moves of the first rebalance, from the engine's default placement."""

    moves: float
    """Mean moves of the later rebalances, or the moves of a single rebalance."""

    busiest_within: float
    """Mean transfers within the node of the rank with the most, over the same rebalances."""

    busiest_between: float
    """Mean transfers between nodes of the rank with the most."""


def try_setting(
    trace: LoadTrace,
    topology: Topology,
    setting: Setting,
    planner: PlannerOptions,
    rebalancer: RebalancerOptions,
) -> Trial:
    """Replay `trace` with a setting.

    Args:
        trace: the load.
        topology: nodes, ranks and groups, with the slots of the setting.
        setting: its interval and price replace the options.
        planner: options of the planner.
        rebalancer: options of the window: snapshots and history.

    Raises:
        TraceError: the load has at most one interval.
    """
    options = planner.model_copy(update={"move_price": setting.move_price, "policy": "adaptive"})
    setup = policy_setup("adaptive", options)
    counts: list[tuple[int, int, int]] = []

    def watch(window: torch.Tensor, topology: Topology, current: Placement | None) -> Placement:
        assert current is not None
        placement = setup.policy(window, topology, current)
        counts.append(_transfers(current, placement, topology))
        return placement

    result = simulate(
        trace,
        topology,
        PolicySetup(setup.name, watch),
        setting.interval,
        snapshots=rebalancer.snapshots,
        history=rebalancer.history,
    )
    later = counts[1:] or counts
    return Trial(
        balancedness=result.balancedness,
        rebalances=len(counts),
        first_moves=counts[0][0],
        moves=sum(item[0] for item in later) / len(later),
        busiest_within=sum(item[1] for item in later) / len(later),
        busiest_between=sum(item[2] for item in later) / len(later),
    )


def _transfers(old: Placement, new: Placement, topology: Topology) -> tuple[int, int, int]:
    """Number of transfers: in all, of the busiest rank within its node, of the busiest rank between nodes."""
    sends = plan_migration(old, new, topology).sends
    within = sends.source_rank // topology.ranks_per_node == sends.rank // topology.ranks_per_node

    def busiest(chosen: torch.Tensor) -> int:
        ends = (sends.source_rank[chosen], sends.rank[chosen])
        return max(int(torch.bincount(ranks, minlength=1).max()) for ranks in ends)

    return sends.rank.numel(), busiest(within), busiest(~within)


class TrialCache:
    """A folder of trials.

    Args:
        folder: created with the first trial; None disables the cache.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self.hits = 0

    def key(
        self,
        trace: LoadTrace,
        topology: Topology,
        setting: Setting,
        planner: PlannerOptions,
        rebalancer: RebalancerOptions,
    ) -> str:
        """Digest of the load, the topology, the options and the code of a trial."""
        about = {
            "load": [str(trace.load.dtype), list(trace.load.shape)],
            "topology": dataclasses.asdict(topology),
            "setting": dataclasses.asdict(setting),
            "planner": planner.model_dump(mode="json"),
            "window": [rebalancer.snapshots, rebalancer.history],
            "code": _code(),
        }
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
        digest.update(trace.load.contiguous().numpy().data)
        return digest.hexdigest()

    def get(self, key: str) -> Trial | None:
        """The trial of a key, or None. An unreadable file is ignored: the trial is repeated."""
        if self._folder is None:
            return None
        try:
            trial = Trial.model_validate_json((self._folder / f"{key}.json").read_bytes())
        except (OSError, ValidationError):
            return None
        self.hits += 1
        return trial

    def put(self, key: str, trial: Trial) -> None:
        """Store a trial.

        Raises:
            TraceError: the folder cannot be written.
        """
        if self._folder is None:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TraceError(f"{self._folder}: cannot be written: {error}") from None
        with written_whole(self._folder / f"{key}.json") as part:
            part.write_text(trial.model_dump_json(), encoding="utf-8")


@cache
def _code() -> str:
    """Digest of all code of a trial: a new version of the planner repeats the trials."""
    package = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(path for part in _RUN_BY_TRIALS for path in (package / part).rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
