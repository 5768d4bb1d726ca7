"""What each rank of the demo does: serve the same batches with and without balancing, and compare."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...config.options import DemoOptions, MetricsOptions, PlannerOptions, RebalancerOptions
from ...core.topology import Topology
from ...integration.torch_moe import MoEConfig, MoEModel
from ...observability.server import serve_metrics
from ...offline.synthetic_traffic import TokenStream
from ...runtime.rebalancer import RebalanceReport

__all__ = ["IntervalRecord", "MetricsReady", "StepDone", "compare_outputs", "model_config", "serve"]

# Float32 sums of a few hundred terms in another order differ by some 1e-5 of their size.
_RELATIVE, _ABSOLUTE = 1e-4, 1e-3
# Router logits are of size 1; where the last expert chosen and the first one not chosen are this close,
# rounding decides between them, and either choice is right.
_TIE = 1e-5


@dataclass(frozen=True, eq=False)
class Served:
    """What a model made of a batch.

    Attributes:
        logits: float32 [tokens, vocab].
        rows: per layer, the (token, expert) pairs that this rank computed.
        tie: bool [tokens], whether rounding may decide which experts a token goes to.
    """

    logits: torch.Tensor
    rows: list[int]
    tie: torch.Tensor


@dataclass(frozen=True)
class StepDone:
    """Progress: so many steps are done on a rank."""

    steps: int


@dataclass(frozen=True)
class MetricsReady:
    """From now on until the rank ends, its metrics are at this address."""

    url: str


@dataclass(frozen=True, eq=False)
class IntervalRecord:
    """What one rank saw in one interval.

    Attributes:
        interval: index of the interval.
        rows: int64 [steps, layers], (token, expert) pairs that this rank computed, with balancing.
        rows_static: the same of the model that is never rebalanced.
        tokens: tokens whose outputs were compared.
        wrong: those among them with another prediction, or logits that differ by more than rounding.
        ties: those that differ, but whose router is undecided between two experts.
        difference: largest difference between logits, apart from those.
        reports: rebalances that have ended since the last record; in the background they end a few steps
            after the interval that they are about.
        wrong_slots: slots of this rank that hold other weights than the placement says, after that.
    """

    interval: int
    rows: np.ndarray[Any, np.dtype[np.int64]]
    rows_static: np.ndarray[Any, np.dtype[np.int64]]
    tokens: int
    wrong: int
    ties: int
    difference: float
    reports: tuple[RebalanceReport, ...]
    wrong_slots: int


@dataclass(frozen=True)
class Comparison:
    """Of the outputs of a batch: tokens that differ, ties that differ, largest difference but for those."""

    wrong: int
    ties: int
    difference: float


class _WatchedModel(MoEModel):  # type: ignore[misc]  # mypy knows the adapters only once installed
    """The model, which also tells what `Served` says."""

    _rows: list[int]
    _tie: torch.Tensor

    def serve(self, tokens: torch.Tensor) -> Served:
        self._rows = [0] * self.config.num_layers
        self._tie = torch.zeros(tokens.shape[0], dtype=torch.bool)
        return Served(self.forward(tokens), self._rows, self._tie)

    def _moe(self, layer: int, x: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
        top_k = self.config.top_k
        if top_k < self.config.num_logical:
            top = (x @ self.routers[layer].T).topk(top_k + 1).values
            self._tie |= top[:, top_k - 1] - top[:, top_k] < _TIE
        out: torch.Tensor = super()._moe(layer, x, valid)
        return out

    def _run_experts(self, layer: int, rows: torch.Tensor, counts: list[int]) -> torch.Tensor:
        self._rows[layer] += rows.shape[0]
        out: torch.Tensor = super()._run_experts(layer, rows, counts)
        return out


def model_config(options: DemoOptions, topics: int) -> MoEConfig:
    """The model that the demo serves.

    Raises:
        ConfigError: a number outside its range.
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
    options: DemoOptions,
    planner: PlannerOptions,
    rebalancer: RebalancerOptions,
    metrics: MetricsOptions,
    mix: np.ndarray[Any, np.dtype[np.float64]],
) -> None:
    """The life of one rank. Sends `StepDone`, `IntervalRecord`, and `MetricsReady` where it serves metrics.

    Args:
        rank: this rank.
        send: takes messages to the parent.
        options: of the demo.
        planner: of the planner.
        rebalancer: of the rebalancer; its interval is that of `options`.
        metrics: whether and where the first rank serves the metrics of the balanced model.
        mix: float64 [steps, topics], the share of each topic at each step.
    """
    config = model_config(options, mix.shape[1])
    topology = Topology(num_ranks=options.ranks, num_slots=options.slots)
    balanced = _WatchedModel(config, topology, options=rebalancer, planner=planner)
    # Longer than the run: the same code, never rebalanced.
    never = rebalancer.model_copy(update={"interval": options.steps + 1})
    static = _WatchedModel(config, topology, options=never, planner=planner)
    server = serve_metrics(balanced.rebalancer, metrics, model="demo")
    if server is not None:
        send(MetricsReady(f"http://{metrics.host}:{server.port}/metrics"))
    stream = TokenStream(config.vocab, config.num_topics, mix, options.seed)

    for start in range(0, options.steps, options.interval):
        stop = min(start + options.interval, options.steps)
        rows, rows_static = [], []
        wrong, ties, difference = 0, 0, 0.0
        reports = []
        for step in range(start, stop):
            tokens = stream.batch(step, rank, options.tokens)
            served, expected = balanced.serve(tokens), static.serve(tokens)
            rows.append(served.rows)
            rows_static.append(expected.rows)
            compared = compare_outputs(served.logits, expected.logits, expected.tie)
            wrong += compared.wrong
            ties += compared.ties
            difference = max(difference, compared.difference)
            # After the last batch there is nothing left to rebalance for.
            if step < options.steps - 1:
                report = balanced.step()
                reports += [report] if report is not None else []
                static.step()
            send(StepDone(step + 1))
        if stop == options.steps:
            known = len(balanced.rebalancer.reports)
            balanced.rebalancer.close()
            static.rebalancer.close()
            reports += list(balanced.rebalancer.reports)[known:]
        send(
            IntervalRecord(
                interval=start // options.interval,
                rows=np.array(rows, np.int64),
                rows_static=np.array(rows_static, np.int64),
                tokens=(stop - start) * options.tokens,
                wrong=wrong,
                ties=ties,
                difference=difference,
                reports=tuple(reports),
                wrong_slots=balanced.wrong_slots(),
            )
        )


def compare_outputs(logits: torch.Tensor, expected: torch.Tensor, tie: torch.Tensor) -> Comparison:
    """Whether two models say the same.

    Args:
        logits: float32 [tokens, vocab].
        expected: the same of the reference.
        tie: bool [tokens], where another choice of experts would have been right too.
    """
    close = torch.isclose(logits, expected, rtol=_RELATIVE, atol=_ABSOLUTE).all(1)
    # A prediction is the same, too, where the reference has the two candidates level within rounding.
    best = expected.max(1).values
    chosen = expected.gather(1, logits.argmax(1, keepdim=True)).squeeze(1)
    differs = ~close | (chosen < best - _ABSOLUTE - _RELATIVE * best.abs())
    difference = (logits - expected).abs().amax(1).masked_fill(differs & tie, 0)
    return Comparison(int((differs & ~tie).sum()), int((differs & tie).sum()), float(difference.max()))
