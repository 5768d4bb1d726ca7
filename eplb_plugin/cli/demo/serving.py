"""One rank of the demo: it serves the same batches with and without rebalancing, and compares outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...config.options import DemoOptions
from ...config.sources import Settings
from ...core.balancedness import rank_loads
from ...core.topology import Topology
from ...integration.torch_moe import MoEConfig, MoEModel
from ...observability.server import serve_metrics
from ...offline.synthetic_traffic import TokenStream
from ...runtime.rebalancer import RebalanceReport

__all__ = [
    "Comparison",
    "IntervalRecord",
    "MetricsReady",
    "StepDone",
    "compare_outputs",
    "model_config",
    "serve",
]

# Float32 sums of a few hundred terms in another order differ by about 1e-5 of their size.
_RELATIVE, _ABSOLUTE = 1e-4, 1e-3
# Maximum difference between the router logits of the last expert chosen and the first not chosen at which
# rounding may decide. Router logits have size 1.
_TIE = 1e-5


@dataclass(frozen=True, eq=False)
class Served:
    """The output of a model for a batch.

    Attributes:
        logits: float32 [tokens, vocab].
        rows: [layers], (token, expert) pairs computed by this rank.
        counts: int64 [layers, logical], the tokens of this rank.
        tie: bool [tokens], whether rounding may decide the choice of experts.
    """

    logits: torch.Tensor
    rows: list[int]
    counts: torch.Tensor
    tie: torch.Tensor


@dataclass(frozen=True)
class StepDone:
    """Progress of a rank: steps done."""

    steps: int


@dataclass(frozen=True)
class MetricsReady:
    """The rank serves its metrics at this address until it ends."""

    url: str


@dataclass(frozen=True)
class Comparison:
    """Outputs with rebalancing compared with outputs without it.

    Attributes:
        tokens: tokens compared.
        wrong: tokens with another prediction, or logits that differ by more than rounding.
        ties: tokens that differ, but with a tie in a router: both choices of experts are right.
        difference: maximum difference between logits, without ties.
    """

    tokens: int = 0
    wrong: int = 0
    ties: int = 0
    difference: float = 0.0

    def __add__(self, other: Comparison) -> Comparison:
        return Comparison(
            self.tokens + other.tokens,
            self.wrong + other.wrong,
            self.ties + other.ties,
            max(self.difference, other.difference),
        )


@dataclass(frozen=True, eq=False)
class IntervalRecord:
    """One interval on one rank.

    Attributes:
        interval: index of the interval.
        rows: int64 [steps, layers], (token, expert) pairs computed by this rank, with rebalancing.
        even: float64 [steps, layers, ranks], pairs of this rank's tokens on each rank, with rebalancing and
            the even split.
        rows_static: int64 [steps, layers], the same without rebalancing.
        compared: the outputs compared.
        reports: rebalances that ended since the last record. In the background, a rebalance ends some steps
            after its interval.
        wrong_slots: slots of this rank whose weights contradict the placement, at the end of the interval.
    """

    interval: int
    rows: np.ndarray[Any, np.dtype[np.int64]]
    even: np.ndarray[Any, np.dtype[np.float64]]
    rows_static: np.ndarray[Any, np.dtype[np.int64]]
    compared: Comparison
    reports: tuple[RebalanceReport, ...]
    wrong_slots: int


class _WatchedModel(MoEModel):  # type: ignore[misc]  # mypy knows the adapters only once installed
    """The model with a record of rows, counts and ties for `Served`."""

    _rows: list[int]
    _counts: torch.Tensor
    _tie: torch.Tensor

    def serve(self, tokens: torch.Tensor) -> Served:
        self._rows = [0] * self.config.num_layers
        self._counts = torch.zeros(self.config.num_layers, self.config.num_logical, dtype=torch.int64)
        self._tie = torch.zeros(tokens.shape[0], dtype=torch.bool)
        return Served(self.forward(tokens), self._rows, self._counts, self._tie)

    def _moe(self, layer: int, x: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
        top_k, logical = self.config.top_k, self.config.num_logical
        top, experts = (x @ self.routers[layer].T).topk(min(top_k + 1, logical))
        self._counts[layer] = torch.bincount(experts[:, :top_k].flatten(), minlength=logical)
        if top_k < logical:
            self._tie |= top[:, top_k - 1] - top[:, top_k] < _TIE
        out: torch.Tensor = super()._moe(layer, x, valid)
        return out

    def _run_experts(self, layer: int, rows: torch.Tensor, counts: list[int]) -> torch.Tensor:
        self._rows[layer] += rows.shape[0]
        out: torch.Tensor = super()._run_experts(layer, rows, counts)
        return out


def model_config(options: DemoOptions, topics: int) -> MoEConfig:
    """The model of the demo.

    Raises:
        ConfigError: a number is out of range.
    """
    return MoEConfig(
        num_topics=topics,
        hidden=options.hidden,
        expert_hidden=options.expert_hidden,
        num_layers=options.layers,
        num_logical=options.experts,
        top_k=options.top_k,
        seed=options.seed,
    )


def serve(
    rank: int,
    send: Callable[[Any], None],
    settings: Settings,
    mix: np.ndarray[Any, np.dtype[np.float64]],
) -> None:
    """Serve all steps on one rank.

    Args:
        rank: this rank.
        send: sends a message to the parent: `StepDone`, `IntervalRecord` or, with metrics, `MetricsReady`.
        settings: the rebalancer has the interval and the dispatch of the demo. The first rank serves the
            metrics of the rebalanced model.
        mix: float64 [steps, topics], share of each topic at each step.
    """
    options, metrics = settings.demo, settings.metrics
    config = model_config(options, mix.shape[1])
    topology = Topology(num_ranks=options.ranks, num_slots=options.slots)
    # Without rebalancing: the same code with an interval longer than the run.
    never = settings.replaced("rebalancer.interval", options.steps + 1)
    never = never.replaced("rebalancer.dispatch", "even").replaced("planner.dispatch", "even")
    balanced, static = (
        _WatchedModel(config, topology, options=item.rebalancer, planner=item.planner)
        for item in (settings, never)
    )
    server = serve_metrics(balanced.rebalancer, metrics, model="demo")
    if server is not None:
        send(MetricsReady(f"http://{metrics.host}:{server.port}/metrics"))
    stream = TokenStream(config.vocab, config.num_topics, mix, options.seed)

    for start in range(0, options.steps, options.interval):
        stop = min(start + options.interval, options.steps)
        rows, even, rows_static, reports = [], [], [], []
        compared = Comparison()
        for step in range(start, stop):
            tokens = stream.batch(step, rank, options.tokens)
            served, expected = balanced.serve(tokens), static.serve(tokens)
            rows.append(served.rows)
            even.append(rank_loads(served.counts, balanced.rebalancer.placement, topology)[0].numpy())
            rows_static.append(expected.rows)
            compared += compare_outputs(served.logits, expected.logits, expected.tie)
            # A rebalance after the last batch would be useless.
            if step < options.steps - 1:
                if (report := balanced.step()) is not None:
                    reports.append(report)
                static.step()
            send(StepDone(step + 1))
        if stop == options.steps:
            known = len(balanced.rebalancer.reports)
            balanced.rebalancer.close()
            static.rebalancer.close()
            reports += list(balanced.rebalancer.reports)[known:]
        counts = np.array(rows, np.int64), np.array(even), np.array(rows_static, np.int64)
        wrong = balanced.wrong_slots()
        send(IntervalRecord(start // options.interval, *counts, compared, tuple(reports), wrong))


def compare_outputs(logits: torch.Tensor, expected: torch.Tensor, tie: torch.Tensor) -> Comparison:
    """Compare the outputs of two models for a batch.

    Args:
        logits: float32 [tokens, vocab].
        expected: float32 [tokens, vocab], logits of the reference.
        tie: bool [tokens], whether another choice of experts is right too.
    """
    close = torch.isclose(logits, expected, rtol=_RELATIVE, atol=_ABSOLUTE).all(1)
    # The prediction may be another token whose logit in the reference is the maximum, within rounding.
    best = expected.max(1).values
    chosen = expected.gather(1, logits.argmax(1, keepdim=True)).squeeze(1)
    differs = ~close | (chosen < best - _ABSOLUTE - _RELATIVE * best.abs())
    difference = (logits - expected).abs().amax(1).masked_fill(differs & tie, 0)
    wrong, ties = int((differs & ~tie).sum()), int((differs & tie).sum())
    return Comparison(len(logits), wrong, ties, float(difference.max()))
