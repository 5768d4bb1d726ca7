"""Trial of one setting on one load: balancedness and moves; and a folder as the cache of trials."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from ..config.options import PlannerOptions, RebalancerOptions
from ..core.balancedness import balancedness
from ..core.errors import ConfigError, TraceError
from ..core.placement import Placement
from ..core.safe_files import written_whole
from ..core.topology import Topology
from ..offline.dispatch_replay import has_whole_counts, score
from ..offline.simulation import policy_setup, simulate
from ..offline.traces import LoadTrace
from ..runtime.weights.migration import plan_migration

__all__ = ["Setting", "Trial", "TrialCache", "Unmoved", "try_setting", "unmoved"]

_RUN_BY_TRIALS = ("advisor", "core", "dispatch", "offline", "planning", "runtime/weights")


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

    even_cost: float | None = None
    """Cost of the slowest rank / mean load of a rank, with the even split; None for loads in fractions of
    tokens."""

    balanced_cost: float | None = None
    """The same with dispatch `balanced`."""


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
        rebalancer: options of the window, snapshots and history; and `expert_cost`, in tokens.

    Raises:
        TraceError: the load has at most one interval. ConfigError: `expert_cost` is no number.
    """
    if not isinstance(rebalancer.expert_cost, int):
        raise ConfigError(f"a trial needs expert_cost in tokens, not {rebalancer.expert_cost!r}")
    dispatches = ("even", "balanced") if has_whole_counts(trace.single_steps) else ()
    options = planner.model_copy(update={"move_price": setting.move_price, "policy": "adaptive"})
    result = simulate(
        trace,
        topology,
        policy_setup("adaptive", options),
        setting.interval,
        snapshots=rebalancer.snapshots,
        history=rebalancer.history,
        dispatches=dispatches,
        expert_cost=rebalancer.expert_cost,
    )
    even_cost, balanced_cost = [item.cost for item in result.dispatches] or (None, None)
    default = Placement.default(trace.num_layers, trace.num_experts, topology.num_slots)
    placements = [default, *(item.placement for item in result.intervals)]
    counts = [_transfers(*pair, topology) for pair in itertools.pairwise(placements)]
    later = counts[1:] or counts
    return Trial(
        balancedness=result.balancedness,
        rebalances=len(counts),
        first_moves=counts[0][0],
        moves=sum(item[0] for item in later) / len(later),
        busiest_within=sum(item[1] for item in later) / len(later),
        busiest_between=sum(item[2] for item in later) / len(later),
        even_cost=even_cost,
        balanced_cost=balanced_cost,
    )


@dataclass(frozen=True)
class Unmoved:
    """A load without rebalancing and redundant experts.

    Attributes:
        balancedness: mean over its steps.
        cost: as `Trial.even_cost`.
    """

    balancedness: float
    cost: float | None

    def speedup(self, trial: Trial, expert_cost: int) -> float:
        """Of the MoE layers in `trial`, over this."""
        if expert_cost and self.cost is not None and trial.even_cost is not None:
            return self.cost / trial.even_cost
        return trial.balancedness / self.balancedness


def unmoved(trace: LoadTrace, topology: Topology, expert_cost: int) -> Unmoved:
    """Score the default placement on all steps of `trace`, which holds tokens."""
    placement = Placement.default(trace.num_layers, trace.num_experts, topology.num_slots)
    steps = trace.single_steps
    if not has_whole_counts(steps):
        return Unmoved(balancedness(steps, placement, topology), None)
    found = score("even", steps, placement, topology, expert_cost=expert_cost)
    return Unmoved(found.balancedness, found.peak_cost / found.mean_load)


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
            "samples": list(trace.sample_steps),
            "topology": dataclasses.asdict(topology),
            "setting": dataclasses.asdict(setting),
            "planner": planner.model_dump(mode="json"),
            "window": [rebalancer.snapshots, rebalancer.history],
            "expert_cost": rebalancer.expert_cost,
            "code": _code(),
        }
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
        for part in (trace.load, *(() if trace.samples is None else (trace.samples,))):
            digest.update(part.contiguous().numpy().data)
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
