"""The planner as an algorithm of SGLang: from the value of `--eplb-algorithm` and counts to SGLang's maps."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist

from ...config.options import PlannerOptions
from ...core.errors import ConfigError, LoadError
from ...core.placement import Placement
from ...core.topology import Topology
from ...planning.planner import plan, warmup
from ...runtime.control.rank_group import RankGroup, content_hash
from ...runtime.move_times import StepTimes
from ..common.agreement import agree_on_plan, announce
from ..common.expert_bytes import ExpertBytes
from ..common.options import SHARED, EngineOptions, options_in_settings
from .dispatch import LayerSolvers
from .static_dispatch import SglangPlanner

__all__ = [
    "ALGORITHM",
    "ALGORITHMS",
    "OPTIONS",
    "SglangBalancer",
    "SglangMaps",
    "fold_busy_steps",
    "is_first_rank",
    "is_ours",
    "parse_algorithm",
    "sample_busy_steps",
]

_logger = logging.getLogger(__name__)

ALGORITHM = "eplb_plugin"
"""The name of this package's planner among SGLang's algorithms."""

ALGORITHMS = (ALGORITHM, "ensemble")
"""All names of it: `ensemble` is the former name, for the same planner with the same options."""

# A nested section does not fit after the colon: the packer of `ensemble` is configured by the file.
_SETTINGS = {name: f"planner.{name}" for name in PlannerOptions.model_fields if name != "ensemble"}
_SETTINGS |= SHARED
_LONGEST = 200

OPTIONS = ("config", "check_agreement", "mode", *_SETTINGS)
"""Options after the name."""


def is_ours(algorithm: str) -> bool:
    """Whether the value of `--eplb-algorithm` names this package, well-formed or not."""
    return algorithm.partition(":")[0].strip() in ALGORITHMS


def parse_algorithm(algorithm: str) -> EngineOptions:
    """The options in `eplb_plugin`, or in `eplb_plugin:OPTION=VALUE,OPTION=VALUE` with names from `OPTIONS`.

    They go over the environment, which goes over the file in `config` or EPLB_PLUGIN_CONFIG. Of the file
    count the section `planner`, of `rebalancer` what `SHARED` names and `mode: observe`, and `enabled` of
    `metrics`.

    Raises:
        ConfigError: a malformed, unknown or repeated option, a wrong value, or an unusable file.
    """
    source = f"--eplb-algorithm {_shortened(algorithm)}"
    given = _split(source, algorithm)
    path = given.pop("config", None)
    overrides = {_SETTINGS[name]: given.pop(name) for name in list(given) if name in _SETTINGS}
    try:
        return EngineOptions(**{**options_in_settings(path, overrides), **given})
    except ConfigError as error:
        # The name of the file may have line breaks in it.
        raise ConfigError(f"{source}: {' '.join(str(error).split())}") from None


class SglangMaps(NamedTuple):
    """The result of an algorithm of SGLang; all int64, on the CPU.

    Attributes:
        physical_to_logical: [layers, slots].
        logical_to_physical: [layers, logical, max_replicas], padded with -1.
        replica_count: [layers, logical].
    """

    physical_to_logical: torch.Tensor
    logical_to_physical: torch.Tensor
    replica_count: torch.Tensor

    @classmethod
    def of(cls, placement: Placement) -> SglangMaps:
        placement = placement.to("cpu")
        return cls(placement.physical_to_logical, placement.logical_to_physical, placement.replica_count)


class SglangBalancer:
    """One per process and value of `--eplb-algorithm`. Each rank plans alone, from the same calls.

    Args:
        algorithm: `eplb_plugin`, with options after a colon.

    Attributes:
        expert_bytes: gives the bytes of one expert's weights by layer; None where they are unknown.
        before_first: called once, before the first rebalance.
        solvers: of dispatch `balanced`, where each rank has its own tokens; else None.
        step_times: durations of the forward passes since the last rebalance, on the first rank.

    Raises:
        ConfigError: the options are wrong.
    """

    def __init__(self, algorithm: str) -> None:
        self.algorithm = algorithm
        self.options = parse_algorithm(algorithm)
        self.planner = SglangPlanner(self.options)
        self.expert_bytes: ExpertBytes | None = None
        self.before_first: Callable[[], None] | None = None
        self.solvers: LayerSolvers | None = None
        self.step_times = StepTimes()

    def start(self, current: torch.Tensor, num_logical: int) -> None:
        """Compare options and map with the other ranks, and compile the planner. All ranks call it, when the
        model loads.

        Args:
            current: int64 [layers, slots], the map in force.
            num_logical: logical experts per layer.

        Raises:
            PlacementError: the map leaves experts out.
            AgreementError: options or maps of ranks differ: a file may differ between nodes.
        """
        self.planner.speaks = is_first_rank()
        options = self.options.model_dump_json()
        compare = announce(f"{options} and a map with hash {content_hash(current):016x}")
        if dist.is_initialized():
            compare(range(dist.get_world_size()))
        Placement(current, num_logical)
        if self.options.mode != "observe":
            warmup(dispatch=self.options.planner.for_dispatch(self.options.splits).dispatch)
        if self.planner.static == "fair":
            self.planner.compile_tables()
        if is_first_rank():
            # SGLang starts without the plugin too, and fails at the first rebalance: a line to search for.
            _logger.warning("eplb-plugin is active: --eplb-algorithm %s, options %s", self.algorithm, options)

    def place_at_start(
        self, load: torch.Tensor, topology: Topology, num_logical: int | None = None
    ) -> SglangMaps:
        """Plan from a recorded load before there are weights to move. All ranks call it.

        Args:
            load: [snapshots, layers, logical] or [layers, logical], tokens.
            num_logical: logical experts per layer; None: as in the load.

        Raises:
            LoadError, TopologyError: the load cannot be used. AgreementError: ranks planned differently.
        """
        if num_logical is not None:
            load = self._routed(load, num_logical)
        planned = plan(load.cpu(), topology, None, self.options.planner).placement
        placement = self.planner.with_table(load, topology, planned, None)
        placement.validate(topology)
        if self.options.check_agreement:
            agree_on_plan(placement.physical_to_logical, _all_ranks(load))
        return SglangMaps.of(placement)

    def rebalance(self, counts: torch.Tensor, topology: Topology, current: torch.Tensor) -> SglangMaps:
        """The maps for the next interval; those in force after a failure or where the gain is too small.

        It raises nothing. All ranks call it with the same arguments.

        Args:
            counts: integer [steps, layers, logical] in time order, tokens over all ranks. Columns beyond the
                experts of the map are those of fused shared experts, and left out.
            current: int64 [layers, slots], the map in force.
        """
        num_logical = int(current.max()) + 1  # each expert has a slot
        if self.before_first is not None:
            first, self.before_first = self.before_first, None
            first()
        ids = self.planner.rebalance(
            lambda: (fold_busy_steps(self._routed(counts, num_logical), self.options.snapshots), topology),
            current,
            samples=lambda: sample_busy_steps(counts[..., :num_logical], self.options.samples),
            ranks=lambda: _all_ranks(counts),
            expert_bytes=self.expert_bytes,
            steps=lambda: int(counts.any(2).any(1).sum()),
            step_seconds=self.step_times.take(),
        )
        return SglangMaps.of(Placement(ids, num_logical))

    def _routed(self, counts: torch.Tensor, num_logical: int) -> torch.Tensor:
        """The columns of routed experts. Every rank holds the shared ones, so they are never placed.

        Raises:
            LoadError: there are fewer columns than experts.
        """
        columns = counts.shape[-1]
        if columns < num_logical:
            raise LoadError(f"counts have {columns} columns, the map {num_logical} experts")
        if columns > num_logical:
            self.planner.speaks = is_first_rank()
            self.planner.warn(
                "shared_expert",
                f"SGLang's counts have {columns} columns for {num_logical} routed experts: the last "
                f"{columns - num_logical} are taken for fused shared experts, and left out of the plan",
            )
        return counts[..., :num_logical]


def fold_busy_steps(counts: torch.Tensor, snapshots: int) -> torch.Tensor:
    """Sum neighbouring steps into snapshots. Steps without tokens, unused rows of the buffer, are left out.

    SGLang's buffer is large and on the device, so it is summed there.

    Args:
        counts: integer [steps, layers, logical], tokens, in time order.
        snapshots: maximum number of snapshots.

    Returns:
        int64 [at most `snapshots`, layers, logical] on the CPU; none where no step had tokens.

    Raises:
        LoadError: `counts` has another shape or dtype.
    """
    if counts.dim() != 3 or counts.is_floating_point() or counts.is_complex():
        given = f"{counts.dtype} {tuple(counts.shape)}"
        raise LoadError(f"counts are {given}, not integers [steps, layers, logical]")
    busy = counts.any(2).any(1)
    if not bool(busy.all()):
        counts = counts[busy]
    parts = counts.tensor_split(min(snapshots, counts.shape[0])) if counts.shape[0] else ()
    folded = [part.sum(0, dtype=torch.int64) for part in parts]
    return torch.stack(folded).cpu() if folded else torch.zeros(0, *counts.shape[1:], dtype=torch.int64)


def sample_busy_steps(counts: torch.Tensor, samples: int) -> torch.Tensor:
    """Single steps with tokens, evenly spaced: int64 [at most `samples`, layers, logical] on the CPU.

    `counts`: as for `fold_busy_steps`.
    """
    busy = counts.any(2).any(1).nonzero()[:, 0]
    number = min(samples, len(busy))
    chosen = busy[torch.arange(number, device=busy.device) * len(busy) // max(number, 1)]
    return counts[chosen].to("cpu", torch.int64)


def is_first_rank() -> bool:
    """Whether this is the rank that writes the log lines and the series of the model."""
    return not dist.is_initialized() or dist.get_rank() == 0


def _all_ranks(counts: torch.Tensor) -> RankGroup:
    """All ranks of the model: SGLang has just summed the counts over them, on their device."""
    return RankGroup(None, counts.device)


def _split(source: str, algorithm: str) -> dict[str, str]:
    """The text of each option given, by name."""
    name, colon, text = algorithm.partition(":")
    if not is_ours(algorithm):
        raise ConfigError(f"{source}: {_shortened(name)!r} is not {ALGORITHM!r}")
    if colon and not text.strip():
        raise ConfigError(f"{source}: no option follows the colon")
    given: dict[str, str] = {}
    for item in text.split(",") if colon else ():
        option, equals, value = (part.strip() for part in item.partition("="))
        if not option or not equals or not value:
            raise ConfigError(f"{source}: {_shortened(item)!r} is not OPTION=VALUE")
        if option not in OPTIONS:
            known = ", ".join(OPTIONS)
            raise ConfigError(f"{source}: unknown option {_shortened(option)!r}; there are {known}")
        if option in given:
            raise ConfigError(f"{source}: {option} is given twice")
        given[option] = value
    return given


def _shortened(text: str) -> str:
    """The text on one line of at most 200 characters, for a message."""
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST else line[:_LONGEST] + "..."
