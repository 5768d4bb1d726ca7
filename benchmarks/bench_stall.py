"""How long rebalancing stalls the steps of a model that goes on serving: never, sync and async side by side.

    python benchmarks/bench_stall.py [--experts small|large] [--ranks 2]

Three copies of one small expert-parallel model serve the same traffic on real processes over gloo. They take
turns step by step while nothing moves, and one after the other for a rebalance: within the step that ends an
interval, in the background, or between the steps that are measured. So all three serve with the same
placements. Prints a table and one line of JSON. Give it a core for each rank; on fewer the background takes
time from the steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import eplb_plugin as eplb
from eplb_plugin.cli.demo.ranks import run_ranks
from eplb_plugin.integration.torch_moe import MoEConfig, MoEModel
from eplb_plugin.runtime.rebalancer import RebalanceReport

MODES = ("never", "sync", "async")
TOPICS, LAYERS, EXPERTS, SLOTS_PER_RANK = 8, 12, 32, 18
TOGETHER = 24  # steps in turn


@dataclass(frozen=True)
class Setting:
    """A model whose steps take about as long as those of the other ones.

    Attributes:
        hidden, inner: sizes of an expert.
        tokens: of a step and rank.
        room: steps that a rebalance in the background may take.
        rebalances: how many to measure.
    """

    hidden: int
    inner: int
    tokens: int
    room: int
    rebalances: int

    @property
    def interval(self) -> int:
        return TOGETHER + self.room


SETTINGS = {
    "small": Setting(hidden=128, inner=512, tokens=32, room=46, rebalances=14),
    "large": Setting(hidden=256, inner=1024, tokens=3, room=86, rebalances=8),
}


@dataclass
class Served:
    """What a mode was seen to do, in seconds and bytes.

    Attributes:
        quiet: steps while nothing moved.
        during: all steps of the rebalances.
        worst: the longest step of each rebalance.
        stalls: how much longer that was than the median quiet step of the same turn.
        moved: bytes, over all ranks.
    """

    quiet: list[float] = field(default_factory=list)
    during: list[float] = field(default_factory=list)
    worst: list[float] = field(default_factory=list)
    stalls: list[float] = field(default_factory=list)
    moved: int = 0


class Model:
    """One of the copies on one rank.

    Args:
        mode: one of MODES.
        setting: of the model.
        rank: this one.
        ranks: of the group.
    """

    def __init__(self, mode: str, setting: Setting, rank: int, ranks: int) -> None:
        self._tokens = setting.tokens
        self._rank = rank
        self._config = MoEConfig(
            vocab=512,
            num_topics=TOPICS,
            hidden=setting.hidden,
            expert_hidden=setting.inner,
            num_layers=LAYERS,
            num_logical=EXPERTS,
            top_k=4,
        )
        options = eplb.RebalancerOptions(
            mode="async" if mode == "async" else "sync",
            interval=setting.interval,
            snapshots=16,
            history=1,
            staging_mib=256,
        )
        topology = eplb.Topology(num_ranks=ranks, num_slots=ranks * SLOTS_PER_RANK)
        self._model = MoEModel(self._config, topology, options=options)
        self.balancer = self._model.rebalancer
        self.steps = 0

    def step(self) -> tuple[float, RebalanceReport | None]:
        """Seconds of one step, and what came of a rebalance that ended in it."""
        tokens = self._batch()
        start = time.perf_counter()
        self._model.forward(tokens)
        report = self._model.step()
        seconds = time.perf_counter() - start
        self.steps += 1
        return seconds, report

    def _batch(self) -> torch.Tensor:
        """Token ids, mostly of a topic that changes with every interval: int64 [tokens]."""
        generator = torch.Generator().manual_seed(self.steps * 1009 + self._rank)
        topic = torch.full((self._tokens,), self.steps // self.balancer.options.interval % TOPICS)
        some = torch.rand(self._tokens, generator=generator) < 0.3
        topic[some] = torch.randint(TOPICS, (int(some.sum()),), generator=generator)
        each = self._config.vocab // TOPICS
        return torch.randint(each, (self._tokens,), generator=generator) * TOPICS + topic


def serve(rank: int, send: Callable[[Any], None], setting: Setting, ranks: int, turns: int) -> None:
    """Sends, from the first rank, what each mode was seen to do."""
    models = {mode: Model(mode, setting, rank, ranks) for mode in MODES}
    served = {mode: Served() for mode in MODES}
    for turn in range(turns):
        quiet: dict[str, list[float]] = {mode: [] for mode in MODES}
        for step in range(TOGETHER - 1):
            for at in range(len(MODES)):
                mode = MODES[(step + at) % len(MODES)]
                quiet[mode].append(models[mode].step()[0])
        as_many = 0
        for mode in ("sync", "async", "never"):
            model, now = models[mode], served[mode]
            seconds, report = model.step()
            times = [seconds]
            if mode == "never":
                # It was rebalanced in that step, which is not measured.
                times = [model.step()[0] for _ in range(as_many)]
            while report is None:
                seconds, report = model.step()
                times.append(seconds)
            as_many = len(times)
            while model.steps % setting.interval != setting.interval - TOGETHER:
                model.step()
            # The first turn leaves the placement that engines start from; it is not typical.
            if turn and report.moves:
                now.quiet += quiet[mode]
                now.during += times
                now.worst.append(max(times))
                now.stalls.append(max(times) - statistics.median(quiet[mode]))
                now.moved += report.bytes_moved
    for model in models.values():
        model.balancer.close()
    if rank == 0:
        send(served)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", choices=SETTINGS, default="small")
    parser.add_argument("--ranks", type=int, default=2)
    options = parser.parse_args()
    eplb.warmup()
    setting = SETTINGS[options.experts]
    arguments = (setting, options.ranks, setting.rebalances + 1)
    ((_, served),) = list(run_ranks(serve, options.ranks, arguments, time_limit=1800))
    base = statistics.median(served["never"].quiet)
    # Steps vary: of as many steps without any rebalance, one is the longest as well.
    usual = statistics.median(served["never"].stalls)
    stall = statistics.median(served["sync"].stalls)
    rows = []
    for mode, now in served.items():
        own = statistics.median(now.stalls) - (0 if mode == "sync" else usual)
        rows.append(
            {
                "mode": mode,
                "quiet_ms": 1e3 * statistics.median(now.quiet),
                "quiet_percent": 100 * (statistics.median(now.quiet) / base - 1),
                "during_ms": 1e3 * statistics.median(now.during),
                "worst_ms": 1e3 * statistics.median(now.worst),
                "stall_ms": 1e3 * own,
                "of_sync": own / stall,
                "steps": len(now.during) / len(now.worst),
                "mb": now.moved / 1e6 / len(now.worst),
                "rebalances": len(now.worst),
            }
        )
    table = Table(
        title=f"{options.ranks} ranks, {LAYERS} layers, {EXPERTS} {options.experts} experts",
        caption="Medians on the first rank. quiet: steps while nothing moves. worst: the longest step of\n"
        "a rebalance; of as many steps as async takes where there is none. stall: how much longer\n"
        "than a quiet step; for async, beyond what it is without a rebalance.",
        caption_justify="left",
    )
    names = ("mode", "quiet, ms", "slower", "during, ms", "worst, ms", "stall, ms", "of sync", "steps", "MB")
    for column in names:
        table.add_column(column, justify="left" if column == "mode" else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            str(row["mode"]),
            f"{row['quiet_ms']:.2f}",
            f"{row['quiet_percent']:+.1f} %",
            f"{row['during_ms']:.2f}",
            f"{row['worst_ms']:.1f}",
            f"{row['stall_ms']:.1f}",
            f"{row['of_sync']:.3f}",
            f"{row['steps']:.0f}",
            f"{row['mb']:.1f}",
        )
    Console(width=110).print(table)
    print(json.dumps({"benchmark": "stall", "experts": options.experts, "rows": rows}))


if __name__ == "__main__":
    main()
