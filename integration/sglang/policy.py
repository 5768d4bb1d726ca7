"""The package's planner as an algorithm of SGLang: from the counts it hands over to the maps it takes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ...core.errors import AgreementError, LoadError
from ...core.placement import Placement
from ...core.topology import Topology
from ...planning.planner import plan
from ...planning.warmup import warmup
from ...runtime.control.rank_group import RankGroup, fingerprint
from ..common.planner import EnginePlanner, EngineReport
from .options import parse_algorithm

__all__ = ["SglangBalancer", "SglangMaps", "fold_busy_steps", "is_first_rank"]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SglangMaps:
    """What SGLang expects of an algorithm; all int64, on the CPU.

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
        algorithm: `ensemble`, with options after a colon.

    Attributes:
        expert_bytes: gives the bytes of an expert's weights, by layer; None where that is not known.
        before_first: called once, before the first rebalance.

    Raises:
        ConfigError: the options are wrong.
    """

    def __init__(self, algorithm: str) -> None:
        self.algorithm = algorithm
        self.options = parse_algorithm(algorithm)
        self.planner = EnginePlanner(self.options)
        self.expert_bytes: Callable[[], Mapping[int, int]] | None = None
        self.before_first: Callable[[], None] | None = None
        self._group_of: tuple[object, ...] | None = None
        self._told: set[str] = set()

    def start(self, current: torch.Tensor, num_logical: int) -> None:
        """Compile the planner, and check what it starts from. All ranks call it, when the model loads.

        Args:
            current: int64 [layers, slots], the map in force, on the device that ranks communicate from.
            num_logical: logical experts per layer.

        Raises:
            PlacementError: SGLang was given a map that leaves experts out.
            AgreementError: on all ranks, when their options or maps differ; a file may differ between nodes.
        """
        ranks, options = _ranks(current.device), self.options.model_dump_json()
        # A rank without the plugin does not answer, and then this is the last line.
        _logger.info("eplb-plugin: rank %d of %d waits to compare its options", ranks.rank, ranks.size)
        ranks.agree("the options of the planner", fingerprint(options))
        ranks.agree("the map in force", fingerprint(current))
        Placement(current, num_logical)
        warmup()
        if is_first_rank():
            # SGLang starts without the plugin too, and fails at the first rebalance: a line to look for.
            _logger.warning("eplb-plugin is active: --eplb-algorithm %s, options %s", self.algorithm, options)

    def place_at_start(self, load: torch.Tensor, topology: Topology) -> SglangMaps:
        """Plan from a recorded load before there are weights to move. All ranks call it.

        Args:
            load: [snapshots, layers, logical] or [layers, logical], tokens.
            topology: nodes, ranks, slots and groups.

        Raises:
            LoadError, TopologyError: the load cannot be used. AgreementError: ranks planned differently.
        """
        placement = plan(load.cpu(), topology, None, self.options.planner).placement
        placement.validate(topology)
        if self.options.check_agreement:
            _ranks(load.device).agree("the plan from the recorded load", _fingerprint(placement))
        return SglangMaps.of(placement)

    def rebalance(self, counts: torch.Tensor, topology: Topology, current: torch.Tensor) -> SglangMaps:
        """The maps for the next interval; those in force when planning fails or gains too little.

        It raises nothing. All ranks call it with the same arguments.

        Args:
            counts: integer [steps, layers, logical] in time order, tokens summed over the ranks.
            topology: nodes, ranks, slots and groups.
            current: int64 [layers, slots], the map in force.
        """
        if self.before_first is not None:
            first, self.before_first = self.before_first, None
            first()
        in_force = Placement(current, counts.shape[-1])
        placement = self._place(counts, topology, in_force)
        if self.options.check_agreement:
            try:
                _ranks(counts.device).agree("the plan", _fingerprint(placement))
            except AgreementError as error:
                # Each rank that got here knows it, so all of them keep the map in force.
                self._failed(error)
                placement = in_force
        self.planner.conclude(self.expert_bytes)
        if is_first_rank():
            self._tell(self.planner.reports[-1], in_force, placement)
        return SglangMaps.of(placement)

    def _place(self, counts: torch.Tensor, topology: Topology, in_force: Placement) -> Placement:
        members = (topology, counts.shape[1:])
        if self._group_of not in (None, members):
            self.planner.forget()
        self._group_of = members
        try:
            steps = fold_busy_steps(counts, self.options.snapshots)
            if steps.shape[0]:
                self.planner.observe(steps)
        except Exception as error:  # every kind: the other ranks would wait for this one
            self._failed(error)
        return self.planner.place(topology, in_force)

    def _failed(self, error: Exception) -> None:
        self.planner.failures += 1
        cause = f"{type(error).__name__}: {error}"
        if cause not in self._told:
            self._told.add(cause)
            _logger.error("%s. The map in force stays; this is said once", cause)

    def _tell(self, report: EngineReport, before: Placement, after: Placement) -> None:
        failures = f"; {self.planner.failures} failures so far" if self.planner.failures else ""
        if before == after:
            kept = report.reason or "ranks disagreed"
            _logger.info("rebalance %d: the map in force stays: %s%s", report.number, kept, failures)
            return
        _logger.info(
            "rebalance %d: balancedness %.3f observed, %.3f -> %.3f predicted; %d moves in %d of %d layers; "
            "planned in %.1f ms%s",
            report.number,
            report.observed,
            report.predicted_before,
            report.predicted_after,
            report.moves,
            report.layers,
            after.num_layers,
            1000 * report.plan_seconds,
            failures,
        )


def fold_busy_steps(counts: torch.Tensor, snapshots: int) -> torch.Tensor:
    """Sum neighbouring steps into snapshots, leaving out those without tokens: rows never written to.

    SGLang's buffer is large and on the device, so that is where it is summed.

    Args:
        counts: integer [steps, layers, logical], tokens, in time order.
        snapshots: snapshots to make, at most.

    Returns:
        int64 [at most `snapshots`, layers, logical] on the CPU; none where no step had tokens.

    Raises:
        LoadError: `counts` has another shape or dtype.
    """
    if counts.dim() != 3 or counts.is_floating_point() or counts.is_complex():
        raise LoadError(
            f"counts are {counts.dtype} {tuple(counts.shape)}, not integers [steps, layers, logical]"
        )
    busy = counts.any(2).any(1)
    if not bool(busy.all()):
        counts = counts[busy]
    parts = counts.tensor_split(min(snapshots, counts.shape[0])) if counts.shape[0] else ()
    folded = [part.sum(0, dtype=torch.int64) for part in parts]
    return torch.stack(folded).cpu() if folded else torch.zeros(0, *counts.shape[1:], dtype=torch.int64)


def _ranks(device: torch.device | str) -> RankGroup:
    """All ranks of the model: SGLang has just summed the counts over them, on that device."""
    return RankGroup(None, device)


def is_first_rank() -> bool:
    """Whether this is the rank that speaks for all of the model's."""
    return not dist.is_initialized() or dist.get_rank() == 0


def _fingerprint(placement: Placement) -> int:
    return fingerprint(placement.physical_to_logical.cpu())
