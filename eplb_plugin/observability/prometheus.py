"""Rebalance reports as Prometheus series. A new metric: one field of the report, one entry of METRICS."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import torch

from ..core.balancedness import peak_rank_loads
from ..core.load import as_snapshots
from ..core.placement import Placement
from ..core.topology import Topology
from ..planning.hierarchy import effective_topology
from ..planning.lower_bounds import peak_lower_bound
from ..runtime.reports import RebalanceReport
from .failures import FailureLog

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

__all__ = [
    "METRICS",
    "WARNING_CAUSES",
    "Metric",
    "ModelTelemetry",
    "Rebalanced",
    "Telemetry",
    "lower_bound_gap",
]

_logger = logging.getLogger(__name__)

_RESULTS = ("applied", "skipped", "failed")
_PHASES = ("gather", "plan", "transfer", "commit")
WARNING_CAUSES = (
    "differing_replicas",
    "dropped_plan",
    "long_window",
    "never_stepped",
    "no_eplb_support",
    "shared_expert",
    "stalled_transfer",
    "unmoved_tensors",
)
"""What an engine does without a word: see `docs/metrics.md`."""

_UNLABELLED = ""  # key of a metric's only value, where the model's name is its only label

Values: TypeAlias = Mapping[str, float | None]
"""Value by label; one that is None is unknown and leaves its series alone."""


class Rebalanced(NamedTuple):
    """A report, and the `lower_bound_gap` of its interval; None without load, which has no balancedness."""

    report: RebalanceReport
    gap: float | None


@dataclass(frozen=True)
class Metric:
    """One series for each model, or one for each model and value of a second label.

    Attributes:
        name: of the series; a counter ends in `_total`, a gauge does not.
        help: one sentence for `/metrics`.
        values: values after a rebalance; a counter adds them.
        multiprocess: how an engine's server joins the gauges of pipeline stages: the worst one shows.
        label: name of the second label, or empty.
        start: values before the first rebalance.
    """

    name: str
    help: str
    values: Callable[[Rebalanced], Values]
    multiprocess: Literal["livemin", "livemax"] = "livemax"
    label: str = ""
    start: Values | None = None


def _one(value: float | None) -> Values:
    return {_UNLABELLED: value}


def _predicted(report: RebalanceReport) -> float:
    """Engines predict for the window that the plan was made from, the online loop for the interval."""
    window = report.window_balancedness_after
    return report.balancedness_after if window is None else window


def _result(report: RebalanceReport) -> str:
    return "failed" if report.failed else "skipped" if report.skipped else "applied"


def _effects(report: RebalanceReport) -> Values:
    gain = report.gain_seconds
    # A counter never falls: what the latest interval would have lost counts as no gain.
    return {"cost": report.move_cost_seconds, "gain": None if gain is None else max(0.0, gain)}


def _seconds(report: RebalanceReport) -> Values:
    # A phase that takes no time is the engine's own.
    return {phase: getattr(report, f"{phase}_seconds") or None for phase in _PHASES}


STEPS = Metric(
    "eplb_steps_since_rebalance",
    "Forward steps since the latest rebalance, whatever its result.",
    lambda done: _one(0),
    start=_one(0),
)
ACTIVE = Metric(
    "eplb_active",
    "1 while rebalances go on, 0 when the balancer has turned itself off after losing a rank.",
    lambda done: _one(None),
    "livemin",
    start=_one(1),
)
WARNINGS = Metric(
    "eplb_warnings_total",
    "Silent failures of the engine that were seen, by cause; the log has a line.",
    lambda done: {},
    label="cause",
    start=dict.fromkeys(WARNING_CAUSES, 0.0),
)
METRICS = (
    STEPS,
    ACTIVE,
    WARNINGS,
    Metric(
        "eplb_observed_balancedness_ratio",
        "Mean over max rank load of the latest interval with load, under its own placement.",
        lambda done: _one(None if done.gap is None else done.report.balancedness_before),
        "livemin",
    ),
    Metric(
        "eplb_predicted_balancedness_ratio",
        "Mean over max rank load of recorded load, under the placement now in force.",
        lambda done: _one(None if done.gap is None else _predicted(done.report)),
        "livemin",
    ),
    Metric(
        "eplb_sampled_balancedness_ratio",
        "Mean over max rank cost of sampled steps: with the even split, and as dispatch balanced split them.",
        lambda done: {
            "even": done.report.sampled_balancedness_even,
            "balanced": done.report.sampled_balancedness,
        },
        "livemin",
        label="split",
    ),
    Metric(
        "eplb_lower_bound_gap_ratio",
        "Excess of the peak rank load over its lower bound, as a fraction of the bound.",
        lambda done: _one(done.gap),
    ),
    Metric(
        "eplb_rebalances_total",
        "Rebalances by result: applied, skipped (not worth it) or failed.",
        lambda done: {_result(done.report): 1},
        label="result",
        start=dict.fromkeys(_RESULTS, 0.0),
    ),
    Metric(
        "eplb_experts_moved_total",
        "Transfers of one expert's weights to one rank, over all ranks.",
        lambda done: _one(done.report.moves),
        start=_one(0),
    ),
    Metric(
        "eplb_moved_bytes_total",
        "Bytes of the transferred weights, over all ranks.",
        lambda done: _one(done.report.bytes_moved),
    ),
    Metric(
        "eplb_moves_seconds_total",
        "Estimated seconds that moves cost serving, and that they save until the next rebalance.",
        lambda done: _effects(done.report),
        label="effect",
    ),
    Metric(
        "eplb_rebalance_seconds_total",
        "Seconds of rebalances on the first rank, by phase: gather, plan, transfer, commit.",
        lambda done: _seconds(done.report),
        label="phase",
    ),
)


class Telemetry:
    """The series in one registry. Models of a process share them; the label `model_name` tells them apart.

    Args:
        registry: where they are collected from; an engine's own is `prometheus_client.REGISTRY`.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        from prometheus_client import Counter, Gauge

        self._series: dict[str, Any] = {}
        self._models: dict[str, ModelTelemetry] = {}
        for metric in METRICS:
            labels = ["model_name", *([metric.label] if metric.label else [])]
            if metric.name.endswith("_total"):
                series: Any = Counter(metric.name, metric.help, labels, registry=registry)
            else:
                mode = metric.multiprocess
                series = Gauge(metric.name, metric.help, labels, registry=registry, multiprocess_mode=mode)
            self._series[metric.name] = series

    def of(self, model: str) -> ModelTelemetry:
        """The series of one model, the same object for the same name."""
        if model not in self._models:
            self._models[model] = ModelTelemetry(model, self._series)
        return self._models[model]

    def stepped(self) -> None:
        """A forward step of all models has ended."""
        for model in list(self._models.values()):
            model.stepped()


class ModelTelemetry:
    """The series of one model; a `RebalanceObserver`. Its methods never raise: a failure is logged once.

    Args:
        model: value of the label `model_name`.
        series: collectors of `prometheus_client` by name of the metric.
    """

    def __init__(self, model: str, series: Mapping[str, Any]) -> None:
        self._model = model
        self._series = series
        self._failures = FailureLog(_logger, f"metrics of {model}", "serving goes on")
        with self._guard():
            self._write((metric, metric.start or {}) for metric in METRICS)

    def stepped(self) -> None:
        """A forward step has ended."""
        with self._guard():
            self._series[STEPS.name].labels(self._model).inc()

    def rebalanced(
        self,
        report: RebalanceReport,
        interval_load: torch.Tensor | None = None,
        placement: Placement | None = None,
        topology: Topology | None = None,
    ) -> None:
        """See `RebalanceObserver`. A load that could not be read is None."""
        with self._guard():
            gap = None
            if interval_load is not None and placement is not None and topology is not None:
                gap = lower_bound_gap(interval_load, placement, topology)
            done = Rebalanced(report, gap)
            # All values first: a rebalance with an error among them counts nowhere.
            self._write([(metric, metric.values(done)) for metric in METRICS])

    def warned(self, cause: str) -> None:
        """A silent failure was seen, by one of `WARNING_CAUSES`."""
        with self._guard():
            self._series[WARNINGS.name].labels(self._model, cause).inc()

    def ended(self, *, failed: bool) -> None:
        """See `RebalanceObserver`."""
        if failed:
            self.rebalanced(RebalanceReport.of_nothing(0, "the balancer is off"))
        with self._guard():
            self._series[ACTIVE.name].labels(self._model).set(0)

    def _write(self, values: Iterable[tuple[Metric, Values]]) -> None:
        for metric, by_label in values:
            for label, value in by_label.items():
                if value is None:
                    continue
                series = self._series[metric.name].labels(self._model, *([label] if label else []))
                (series.inc if metric.name.endswith("_total") else series.set)(value)

    @contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever it is, serving is worth more than its figures
            self._failures.add(error)


def lower_bound_gap(load: torch.Tensor, placement: Placement, topology: Topology) -> float | None:
    """Excess of the peak rank load over its lower bound, as a fraction of the bound, summed over layers.

    Example: peaks of 100 and 110 tokens over bounds of 100 and 100 give 0.05. Peak and bound are those of an
    even split. Snapshots are summed first: the bound of one snapshot takes as long as a plan.

    Args:
        load: [layers, logical] or [snapshots, layers, logical], tokens.

    Returns:
        The fraction, 0 where no placement can be better; None for a load without tokens.

    Raises:
        As `rank_loads`.
    """
    total = as_snapshots(load).sum(0, keepdim=True)
    bound = float(peak_lower_bound(total, effective_topology(topology, placement.num_logical)).sum())
    peak = float(peak_rank_loads(total, placement, topology).sum())
    return peak / bound - 1 if bound > 0 else None
