"""`move_price: auto` against fixed prices: time of the layers and of the moves together.

    python benchmarks/bench_move_price.py [--seeds 3] [--quick]

Replays the demo's traffic and three generated profiles, each on a machine, with the trials and the costs of
`eplb-plugin advise`. The time of an interval is the time of the slowest ranks plus the transfers of the
busiest rank. Async counts a tenth of the transfers. The first rebalance is left out. Prints the excess over
the best fixed price in percent, means over the draws of traffic, and one line of JSON. With one draw,
neighbouring prices differ by up to 1 % by chance.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import numpy as np
from rich.console import Console
from rich.table import Table

import eplb_plugin as eplb
from eplb_plugin.advisor.machine import Machine, model_preset
from eplb_plugin.advisor.trial import Setting, Trial, try_setting
from eplb_plugin.cli.demo.serving import model_config
from eplb_plugin.config.options import DemoOptions
from eplb_plugin.integration.torch_moe import MoEModel
from eplb_plugin.offline.synthetic_traffic import TokenStream, generate, topic_mix
from eplb_plugin.offline.traces import LoadTrace
from eplb_plugin.planning.move_cost import EXPERT_SHARE, serving_share

PRICES = (0.001, 0.002, 0.004, 0.009, 0.018, 0.036, 0.07, 0.1)
MODES: tuple[Literal["sync", "async"], ...] = ("sync", "async")


@dataclass(frozen=True)
class Case:
    """A trace on a machine; `model_layers` are those of the model, of which the trace has some."""

    name: str
    trace: LoadTrace
    machine: Machine
    slots: int
    interval: int
    model_layers: int


def demo_traffic() -> LoadTrace:
    """The loads of the demo with its default options, single steps."""
    options = DemoOptions()
    rng = np.random.default_rng(options.seed)
    mix = topic_mix(options.steps, options.topics, drift=options.drift, period=options.period, rng=rng)
    model = MoEModel(
        model_config(options, options.topics),
        eplb.Topology(num_ranks=1, num_slots=options.experts),
        options=eplb.RebalancerOptions(interval=options.steps + 1, snapshots=1024),
    )
    stream = TokenStream(model.config.vocab, options.topics, mix, options.seed)
    for step in range(options.steps):
        for rank in range(options.ranks):
            model.forward(stream.batch(step, rank, options.tokens))
        model.step()
    load = model.rebalancer.window.take().snapshots
    model.rebalancer.close()
    return LoadTrace(load, "the demo")


def cases(seed: int, quick: bool) -> Iterator[Case]:
    if seed == 0:
        options = DemoOptions()
        # Two matrices in 32 bits; gloo over loopback, as measured by bench_transfer.py.
        size = 8.0 * options.hidden * options.expert_hidden
        machine = Machine(
            ranks=options.ranks,
            nodes=1,
            groups=1,
            bytes_per_expert=size,
            bandwidth=1e9,
            node_bandwidth=1e9,
            step_seconds=0.03,
        )
        yield Case("demo, 4 processes", demo_traffic(), machine, options.slots, options.interval, 4)
    for name, model, ranks, nodes, slots, bandwidth, node_bandwidth, step_seconds in (
        ("DeepSeek-V3, 32 H200, 400 Gbit/s", "deepseek-v3", 32, 4, 288, 400e9, 45e9, 0.04),
        ("gpt-oss-20b, 8 H100", "gpt-oss-20b", 8, 1, 40, 400e9, 45e9, 0.01),
        ("Qwen3-235B, 16 GPUs, 25 Gbit/s", "qwen3-235b", 16, 2, 160, 25e9, 3e9, 0.04),
    ):
        preset = model_preset(model)
        layers = min(preset.layers, 4 if quick else 16)
        trace = generate(model, layers=layers, steps=2048, period=1024, seed=seed)
        machine = Machine(
            ranks=ranks,
            nodes=nodes,
            groups=1,
            bytes_per_expert=preset.bytes_per_expert,
            bandwidth=bandwidth,
            node_bandwidth=node_bandwidth,
            step_seconds=step_seconds,
        )
        yield Case(name, trace, machine, slots, 256, preset.layers)


def seconds(case: Case, trial: Trial, setting: Setting, share: float) -> float:
    """Time of an interval in the layers of the trace: of their slowest ranks, and of the moves."""
    machine, layers = case.machine, case.trace.num_layers
    moves = machine.cost(trial, setting, case.trace.num_experts, layers).transfer_seconds
    balanced = EXPERT_SHARE * machine.step_seconds * layers / case.model_layers * case.interval
    return balanced / trial.balancedness + share * moves


def run(case: Case) -> list[dict[str, object]]:
    topology = case.machine.topology(case.slots)

    @cache
    def tried(price: float) -> Trial:
        return try_setting(
            case.trace,
            topology,
            Setting(case.slots, case.interval, price),
            eplb.PlannerOptions(),
            eplb.RebalancerOptions(),
        )

    rows: list[dict[str, object]] = []
    for mode in MODES:
        share = serving_share(mode)
        cost = case.machine.move_cost(case.model_layers, case.interval)
        auto = replace(cost, serving_share=share).move_price(topology)
        for name, price in [("auto", auto), *((f"{price:g}", price) for price in PRICES)]:
            trial, setting = tried(price), Setting(case.slots, case.interval, price)
            rows.append(
                {
                    "case": case.name,
                    "mode": mode,
                    "price": name,
                    "move_price": price,
                    "seconds": seconds(case, trial, setting, share),
                    "balancedness": trial.balancedness,
                    "moves": trial.moves,
                }
            )
    return rows


def excess(rows: list[dict[str, object]], case: str, mode: str) -> dict[str, float]:
    """By price: time over that of the best fixed price, less 1; means over the draws."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if (row["case"], row["mode"]) == (case, mode):
            found.setdefault(str(row["price"]), []).append(float(str(row["seconds"])))
    means = {price: statistics.fmean(values) for price, values in found.items()}
    best = min(value for price, value in means.items() if price != "auto")
    return {price: value / best - 1 for price, value in means.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer layers")
    parser.add_argument("--seeds", type=int, default=3, help="how many draws of each profile")
    arguments = parser.parse_args()
    eplb.warmup()
    rows = [
        {**row, "seed": seed}
        for seed in range(arguments.seeds)
        for case in cases(seed, arguments.quick)
        for row in run(case)
    ]
    table = Table(
        title="Time of layers and moves over that of the best fixed price, %",
        caption=f"{arguments.seeds} draws",
    )
    for column in ("machine", "mode", "auto is", "auto", *(f"{price:g}" for price in PRICES)):
        table.add_column(column, justify="left" if column in ("machine", "mode") else "right")
    for case, mode in dict.fromkeys((str(row["case"]), str(row["mode"])) for row in rows):
        found = excess(rows, case, mode)
        price = next(row["move_price"] for row in rows if (row["case"], row["mode"]) == (case, mode))
        table.add_row(case, mode, f"{price:g}", *(f"{100 * value:.1f}" for value in found.values()))
    Console(width=130).print(table)
    print(json.dumps({"benchmark": "move_price", "rows": rows}))


if __name__ == "__main__":
    main()
