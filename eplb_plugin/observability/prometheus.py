"""What the balancer does, as Prometheus series: few, per model, and never in the way of a rebalance."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch

from ..core.balancedness import peak_rank_loads
from ..core.load import as_snapshots
from ..core.placement import Placement
from ..core.topology import Topology
from ..planning.hierarchy import effective_topology
from ..planning.lower_bounds import peak_lower_bound
from ..runtime.reports import RebalanceReport

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

__all__ = [
    "ModelTelemetry",
    "RebalanceFigures",
    "Telemetry",
    "lower_bound_gap",
]

_logger = logging.getLogger(__name__)

_RESULTS = ("applied", "skipped", "failed")
_PHASES = ("gather", "plan", "transfer", "commit")


@dataclass(frozen=True, kw_only=True)
class RebalanceFigures:
    """One rebalance as the series show it. What is None or left out is unknown, and leaves its series alone.

    Attributes:
        result: whether the placement changed, stayed, or stayed because something failed.
        observed: balancedness of the interval that ended.
        predicted: balancedness of recorded load under the placement now in force.
        gap: see `lower_bound_gap`.
        moves: transfers of one expert's weights to one rank.
        bytes_moved: bytes of these.
        seconds: time on this rank by phase: gather, plan, transfer, commit.
    """

    result: Literal["applied", "skipped", "failed"]
    observed: float | None = None
    predicted: float | None = None
    gap: float | None = None
    moves: int = 0
    bytes_moved: int | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)


class Telemetry:
    """The series in one registry, each with one label: the model's name. Models of a process share them.

    Args:
        registry: where they are collected from; an engine's own is `prometheus_client.REGISTRY`.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        from prometheus_client import Counter, Gauge

        label = ["model_name"]
        # In an engine every series is written by the first rank alone. The stages of a pipeline each have
        # one, though: then gauges show the worst stage, counters the sum.
        self.observed = Gauge(
            "eplb_observed_balancedness_ratio",
            "Mean over max rank load of the latest interval with load, under the placement it ran with.",
            label,
            registry=registry,
            multiprocess_mode="livemin",
        )
        self.predicted = Gauge(
            "eplb_predicted_balancedness_ratio",
            "Mean over max rank load of recorded load, had it run under the placement now in force.",
            label,
            registry=registry,
            multiprocess_mode="livemin",
        )
        self.gap = Gauge(
            "eplb_lower_bound_gap_ratio",
            "Share by which the peak rank load under the placement in force exceeds a lower bound on it.",
            label,
            registry=registry,
            multiprocess_mode="livemax",
        )
        self.steps = Gauge(
            "eplb_steps_since_rebalance",
            "Forward steps since the latest rebalance, whatever came of it.",
            label,
            registry=registry,
            multiprocess_mode="livemax",
        )
        self.rebalances = Counter(
            "eplb_rebalances_total",
            "Rebalances by result: applied, skipped (not worth it) or failed.",
            [*label, "result"],
            registry=registry,
        )
        self.moves = Counter(
            "eplb_experts_moved_total",
            "Transfers of one expert's weights to one rank, over all ranks.",
            label,
            registry=registry,
        )
        self.bytes_moved = Counter(
            "eplb_moved_bytes_total",
            "Bytes of the transferred weights, over all ranks.",
            label,
            registry=registry,
        )
        self.seconds = Counter(
            "eplb_rebalance_seconds_total",
            "Time spent in rebalances on the first rank, by phase: gather, plan, transfer, commit.",
            [*label, "phase"],
            registry=registry,
        )
        self.active = Gauge(
            "eplb_active",
            "1 while rebalances go on, 0 when the balancer has turned itself off after losing a rank.",
            label,
            registry=registry,
            multiprocess_mode="livemin",
        )
        self._models: dict[str, ModelTelemetry] = {}

    def of(self, model: str) -> ModelTelemetry:
        """The series of one model, the same object for the same name."""
        if model not in self._models:
            self._models[model] = ModelTelemetry(self, model)
        return self._models[model]

    def stepped(self) -> None:
        """A forward step of all models has ended."""
        for model in list(self._models.values()):
            model.stepped()


class ModelTelemetry:
    """The series of one model; a `RebalanceObserver`. None of its methods raises: failures are logged once.

    Args:
        telemetry: the series.
        model: value of their label `model_name`.
    """

    def __init__(self, telemetry: Telemetry, model: str) -> None:
        self._all = telemetry
        self._model = model
        self._told: set[str] = set()
        self._guard(self._start)

    def stepped(self) -> None:
        """A forward step has ended."""
        self._guard(lambda: self._all.steps.labels(self._model).inc())

    def rebalanced(
        self, report: RebalanceReport, interval_load: torch.Tensor, placement: Placement, topology: Topology
    ) -> None:
        """See `RebalanceObserver`."""
        self.record(lambda: _figures(report, interval_load, placement, topology))

    def failed(self) -> None:
        """A rebalance has raised."""
        self.record(lambda: RebalanceFigures(result="failed"))

    def ended(self, *, failed: bool) -> None:
        """See `RebalanceObserver`."""
        if failed:
            self.failed()
        self._guard(lambda: self._all.active.labels(self._model).set(0))

    def record(self, figures: Callable[[], RebalanceFigures]) -> None:
        """Take in a rebalance; `figures` is called here, so that it may raise too."""
        self._guard(lambda: self._record(figures()))

    def _start(self) -> None:
        # So that a rate knows of the first rebalance too.
        self._all.steps.labels(self._model)
        self._all.moves.labels(self._model)
        self._all.active.labels(self._model).set(1)
        for result in _RESULTS:
            self._all.rebalances.labels(self._model, result)

    def _record(self, figures: RebalanceFigures) -> None:
        every, model = self._all, self._model
        if figures.observed is not None:
            every.observed.labels(model).set(figures.observed)
        if figures.predicted is not None:
            every.predicted.labels(model).set(figures.predicted)
        if figures.gap is not None:
            every.gap.labels(model).set(figures.gap)
        if figures.bytes_moved is not None:
            every.bytes_moved.labels(model).inc(figures.bytes_moved)
        for phase, seconds in figures.seconds.items():
            every.seconds.labels(model, phase).inc(seconds)
        every.moves.labels(model).inc(figures.moves)
        every.rebalances.labels(model, figures.result).inc()
        every.steps.labels(model).set(0)

    def _guard(self, write: Callable[[], None]) -> None:
        try:
            write()
        except Exception as error:  # whatever it is, serving is worth more than its figures
            cause = f"{type(error).__name__}: {error}"
            if cause not in self._told:
                self._told.add(cause)
                _logger.exception("metrics of %s: %s; this is said once", self._model, cause)


def lower_bound_gap(load: torch.Tensor, placement: Placement, topology: Topology) -> float | None:
    """By what share the peak rank load of a load exceeds what no placement can go below, over all layers.

    The load is summed over its snapshots first: the bound of each of them takes as long as planning.

    Args:
        load: [layers, logical] or [snapshots, layers, logical], tokens.
        placement: the placement to score.
        topology: nodes, ranks, slots and groups.

    Returns:
        The share: 0 where no placement can be better. None for a load without tokens.

    Raises:
        As `rank_loads`.
    """
    total = as_snapshots(load).sum(0, keepdim=True)
    bound = float(peak_lower_bound(total, effective_topology(topology, placement.num_logical)).sum())
    peak = float(peak_rank_loads(total, placement, topology).sum())
    return peak / bound - 1 if bound > 0 else None


def _figures(
    report: RebalanceReport, interval_load: torch.Tensor, placement: Placement, topology: Topology
) -> RebalanceFigures:
    """The figures of a report. An interval without load says nothing about balance."""
    busy = bool(interval_load.any())
    return RebalanceFigures(
        result="failed" if report.failed else "skipped" if report.skipped else "applied",
        observed=report.balancedness_before if busy else None,
        predicted=report.balancedness_after if busy else None,
        gap=lower_bound_gap(interval_load, placement, topology) if busy else None,
        moves=report.moves,
        bytes_moved=report.bytes_moved,
        seconds={phase: getattr(report, f"{phase}_seconds") for phase in _PHASES},
    )
