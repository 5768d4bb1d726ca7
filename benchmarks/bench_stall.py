"""How long rebalancing stalls the steps of a model that goes on serving: never, sync and async side by side.

    python benchmarks/bench_stall.py [--ranks 2] [--rebalances 8]

Three copies of one small expert-parallel model serve the same traffic on real processes over gloo, taking
turns: one is never rebalanced, one within the step that ends an interval, one in the background. Prints a
table and one line of JSON. Give it a core for each rank; on fewer the background takes time from the steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import eplb_plugin as eplb
from eplb_plugin.cli.ranks import run_ranks
from eplb_plugin.integration.torch_moe import MoEConfig, MoEModel

LAYERS, EXPERTS, SLOTS_PER_RANK = 12, 32, 18
CONFIG = MoEConfig(
    vocab=512, num_topics=8, hidden=128, expert_hidden=512, num_layers=LAYERS, num_logical=EXPERTS, top_k=4
)
INTERVAL, TOKENS = 40, 32
AS_MANY = LAYERS + 6  # steps that a rebalance in the background takes here, about
MODES = ("never", "sync", "async")


def batch(turn: int, step: int, rank: int) -> torch.Tensor:
    """Token ids, mostly of a topic that changes with every turn: int64 [tokens]."""
    generator = torch.Generator().manual_seed(turn * 1_000_003 + step * 1009 + rank)
    topic = torch.full((TOKENS,), turn % CONFIG.num_topics)
    some = torch.rand(TOKENS, generator=generator) < 0.3
    topic[some] = torch.randint(CONFIG.num_topics, (int(some.sum()),), generator=generator)
    each = CONFIG.vocab // CONFIG.num_topics
    return torch.randint(each, (TOKENS,), generator=generator) * CONFIG.num_topics + topic


def serve(rank: int, send: Callable[[Any], None], ranks: int, turns: int) -> None:
    """Sends, from the first rank: for each mode its quiet steps, and the worst and all of each rebalance."""
    topology = eplb.Topology(num_ranks=ranks, num_slots=ranks * SLOTS_PER_RANK)
    models = {}
    for mode in MODES:
        options = eplb.RebalancerOptions(
            mode="sync" if mode == "never" else mode,  # type: ignore[arg-type]
            interval=10**9 if mode == "never" else INTERVAL,
            history=1,
            staging_mib=64,
        )
        models[mode] = MoEModel(CONFIG, topology, options=options)
    quiet: dict[str, list[float]] = {mode: [] for mode in MODES}
    worst: dict[str, list[float]] = {mode: [] for mode in MODES}
    during: dict[str, list[float]] = {mode: [] for mode in MODES}
    moved: dict[str, int] = dict.fromkeys(MODES, 0)
    steps = dict.fromkeys(MODES, 0)
    for turn in range(turns):
        for mode, model in models.items():
            times: list[float] = []
            ended = False
            while not ended:
                start = time.perf_counter()
                model.forward(batch(turn, steps[mode], rank))
                report = model.step()
                seconds = time.perf_counter() - start
                steps[mode] += 1
                begins = steps[mode] % INTERVAL == 0
                if begins or times:
                    times.append(seconds)
                else:
                    quiet[mode].append(seconds)
                ended = report is not None or (mode == "never" and len(times) == AS_MANY)
            # The first turn leaves the placement that engines start from; it is not typical.
            if turn and (report is None or report.moves):
                worst[mode].append(max(times))
                during[mode] += times
                moved[mode] += report.bytes_moved if report is not None else 0
    for model in models.values():
        model.rebalancer.close()
    if rank == 0:
        send((quiet, worst, during, moved))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rebalances", type=int, default=8)
    options = parser.parse_args()
    eplb.warmup()
    messages = run_ranks(serve, options.ranks, (options.ranks, options.rebalances + 1), time_limit=900)
    ((_, (quiet, worst, during, moved)),) = list(messages)
    base = statistics.median(quiet["never"])
    # Steps vary: of as many steps without any rebalance, one is the longest as well.
    usual = statistics.median(worst["never"])
    stall = statistics.median(worst["sync"]) - base
    rows = []
    for mode in MODES:
        rows.append(
            {
                "mode": mode,
                "quiet_ms": 1e3 * statistics.median(quiet[mode]),
                "quiet_percent": 100 * (statistics.median(quiet[mode]) / base - 1),
                "during_ms": 1e3 * statistics.median(during[mode]),
                "worst_ms": 1e3 * statistics.median(worst[mode]),
                "stall_ms": 1e3 * (statistics.median(worst[mode]) - (base if mode == "sync" else usual)),
                "of_sync": (statistics.median(worst[mode]) - (base if mode == "sync" else usual)) / stall,
                "steps": len(during[mode]) / len(worst[mode]),
                "mb": moved[mode] / 1e6 / len(worst[mode]),
            }
        )
    table = Table(
        title=f"{options.ranks} ranks, {LAYERS} layers, {EXPERTS} experts, {options.rebalances} rebalances",
        caption="Medians on the first rank. quiet: steps while nothing moves. worst: the longest step of a\n"
        f"rebalance; of {AS_MANY} steps where there is none. stall: how much longer that is than a quiet\n"
        "step (sync), and than the longest of as many steps without a rebalance (async).",
        caption_justify="left",
    )
    columns = (
        "mode",
        "quiet, ms",
        "slower",
        "during, ms",
        "worst, ms",
        "stall, ms",
        "of sync",
        "steps",
        "MB",
    )
    for column in columns:
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
    print(json.dumps({"benchmark": "stall", "rows": rows}))


if __name__ == "__main__":
    main()
