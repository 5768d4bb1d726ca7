"""Planning time and peak rank load of every policy, side by side.

    python benchmarks/bench_plan.py [--repeat 9] [--few-slots]

Plans one summed load, and the full plan of the online loop: 128 snapshots and the placement in force, also
for dispatch balanced, with 64 single steps. Then one load with two or three slots a rank; `--few-slots` plans
these alone. Prints tables and, as the last line, one JSON object. vLLM's default policy and FlashLB take part
after `make bench-peers`. With a GPU, plans of a load on it are timed too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial

import peers
import torch
from rich.console import Console
from rich.table import Table

import eplb_plugin as eplb
from eplb_plugin.planning.policies import POLICIES

# layers, experts, slots, groups, nodes, ranks
SIZES = [
    (58, 256, 288, 8, 4, 32),
    (58, 256, 288, 8, 18, 144),
    (94, 128, 160, 1, 2, 16),
    (60, 384, 448, 1, 8, 64),
]
# experts, slots, ranks
FEW_SLOTS = [(8, 16, 8), (16, 32, 16), (32, 64, 32), (16, 24, 8)]
SIGMAS = (0.5, 1.0, 1.5, 2.0, 2.5)
DRAWS = 24
PAUSE = 0.02  # seconds before each plan: threads that torch woke for the one before spin for a while
Planner = Callable[[torch.Tensor, eplb.Topology], torch.Tensor]


def lognormal(layers: int, experts: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.empty(layers, experts).log_normal_(6, 0.8, generator=generator).round()


def zipf(layers: int, experts: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    load = 1e5 / torch.arange(1, experts + 1)
    return torch.stack([load[torch.randperm(experts, generator=generator)] for _ in range(layers)]).round()


def ours(policy: str, **options: float) -> Planner:
    chosen = eplb.PlannerOptions(policy=policy, **options)
    return lambda load, topology: eplb.plan(load, topology, options=chosen).placement.physical_to_logical


def theirs(load: torch.Tensor, topology: eplb.Topology) -> torch.Tensor:
    return peers.vllm_default(load, topology, None).physical_to_logical


def measure(planners: dict[str, Planner], repeat: int) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for layers, experts, slots, groups, nodes, ranks in SIZES:
        topology = eplb.Topology(num_nodes=nodes, num_ranks=ranks, num_slots=slots, num_groups=groups)
        for name, draw in (("lognormal", lognormal), ("zipf", zipf)):
            load = draw(layers, experts)
            # Interleaved, so that other load of the machine affects all policies equally.
            times: dict[str, list[float]] = {policy: [] for policy in planners}
            peaks = {}
            for _ in range(repeat):
                for policy, planner in planners.items():
                    time.sleep(PAUSE)
                    start = time.perf_counter()
                    ids = planner(load, topology)
                    times[policy].append(time.perf_counter() - start)
                    peaks[policy] = eplb.rank_loads(load, eplb.Placement(ids, experts), topology).amax(2)
            bound = eplb.plan(load, topology).lower_bound
            rows += [
                {
                    "size": [layers, experts, slots, groups, nodes, ranks],
                    "load": name,
                    "policy": policy,
                    "plan_ms": statistics.median(times[policy]) * 1e3,
                    "peak_over_mean": float(peaks[policy].mean() / load.sum(1).div(ranks).mean()),
                    "peak_over_bound": float((peaks[policy][0] / bound).mean()),
                    "time_over_greedy": statistics.median(times[policy]) / statistics.median(times["greedy"]),
                }
                for policy in planners
            ]
    return rows


def window(layers: int, experts: int, intervals: int) -> torch.Tensor:
    """[32 * intervals, layers, experts]: four topics in a mix that changes from snapshot to snapshot."""
    generator = torch.Generator().manual_seed(0)
    base = torch.empty(1, layers, experts).log_normal_(6, 0.8, generator=generator)
    topics = torch.empty(4, layers, experts).log_normal_(0, 0.5, generator=generator)
    mix = torch.rand(32 * intervals, 4, generator=generator).softmax(1)
    noise = torch.empty(32 * intervals, layers, experts).log_normal_(0, 0.1, generator=generator)
    return (base * torch.einsum("st,tle->sle", mix, topics) * noise).round()


def measure_full(repeat: int) -> list[dict[str, object]]:
    """The first rebalance, from the placement that engines load, and the eighth, beside vLLM's default, which
    gets the sum of the last interval."""
    rows: list[dict[str, object]] = []
    for layers, experts, slots, groups, nodes, ranks in SIZES:
        topology = eplb.Topology(num_nodes=nodes, num_ranks=ranks, num_slots=slots, num_groups=groups)
        steps = window(layers, experts, 8)
        start = eplb.Placement.default(layers, experts, slots)
        settled = start
        # One single step of 32,768 tokens in every second snapshot.
        generator = torch.Generator().manual_seed(0)
        singles = torch.poisson(32768 * steps / steps.sum(2, keepdim=True), generator)[::2]
        balanced = eplb.PlannerOptions(dispatch="balanced")
        for_dispatch = start
        for end in range(32, 256, 32):
            begin = max(0, end - 128)
            settled = eplb.plan(steps[begin:end], topology, settled).placement
            for_dispatch = eplb.plan(
                steps[begin:end], topology, for_dispatch, balanced, samples=singles[begin // 2 : end // 2]
            ).placement
        jobs: dict[str, Callable[[], object]] = {
            "first": partial(eplb.plan, steps[:32], topology, start),
            "later": partial(eplb.plan, steps[128:], topology, settled),
            "for dispatch": partial(
                eplb.plan, steps[128:], topology, for_dispatch, balanced, samples=singles[64:]
            ),
        }
        if peers.available():
            total = steps[224:].sum(0)
            jobs["vLLM default"] = partial(theirs, total, topology)
        times: dict[str, list[float]] = {name: [] for name in jobs}
        for _ in range(repeat):
            for name, job in jobs.items():
                time.sleep(PAUSE)
                began = time.perf_counter()
                job()
                times[name].append(time.perf_counter() - began)
        medians = {name: statistics.median(values) for name, values in times.items()}
        rows += [
            {
                "size": [layers, experts, slots, groups, nodes, ranks],
                "plan": name,
                "plan_ms": median * 1e3,
                "time_over_vllm": median / medians["vLLM default"] if "vLLM default" in medians else None,
            }
            for name, median in medians.items()
        ]
    return rows


def flashlb(load: torch.Tensor, topology: eplb.Topology) -> torch.Tensor:
    start = eplb.Placement.default(*load.shape, topology.num_slots)
    return peers.FlashLB()(load[None], topology, start).physical_to_logical


def measure_few_slots(repeat: int) -> list[dict[str, object]]:
    """Peaks over the lower bound of lognormal loads, with two or three slots a rank.

    All draws are layers of one load. vLLM's default plans are those of `greedy`.
    """
    planners: dict[str, Planner] = {"adaptive": ours("adaptive")}
    planners |= (
        {"vLLM default": theirs, "FlashLB": flashlb} if peers.available() else {"greedy": ours("greedy")}
    )
    rows: list[dict[str, object]] = []
    for experts, slots, ranks in FEW_SLOTS:
        topology = eplb.Topology(num_ranks=ranks, num_slots=slots)
        for sigma in SIGMAS:
            generator = torch.Generator().manual_seed(0)
            load = torch.empty(DRAWS, experts).log_normal_(6, sigma, generator=generator).round().clamp(min=1)
            bound = eplb.plan(load, topology).lower_bound
            times: dict[str, list[float]] = {policy: [] for policy in planners}
            ratios = {}
            for turn in range(repeat + 1):
                for policy, planner in planners.items():
                    time.sleep(PAUSE)
                    began = time.perf_counter()
                    ids = planner(load, topology)
                    if turn > 0:  # the first turn compiles
                        times[policy].append(time.perf_counter() - began)
                    peaks = eplb.rank_loads(load, eplb.Placement(ids, experts), topology).amax(2)[0]
                    ratios[policy] = peaks / bound
            rows += [
                {
                    "size": [experts, slots, ranks],
                    "sigma": sigma,
                    "policy": policy,
                    "peak_over_bound": float(ratio.mean()),
                    "worst_peak_over_bound": float(ratio.max()),
                    "layer_ms": statistics.median(times[policy]) / DRAWS * 1e3,
                }
                for policy, ratio in ratios.items()
            ]
    return rows


def show_few_slots(console: Console, rows: list[dict[str, object]]) -> None:
    policies = list(dict.fromkeys(str(row["policy"]) for row in rows))
    table = Table(title=f"Few slots a rank: mean / worst peak over the bound of {DRAWS} draws; ms a layer")
    table.caption = "size: experts, slots, ranks"
    for column in ("size", "sigma", *policies):
        table.add_column(column, no_wrap=True, justify="right")
    for first in range(0, len(rows), len(policies)):
        cells = [
            f"{row['peak_over_bound']:.3f} / {row['worst_peak_over_bound']:.3f}; {row['layer_ms']:.2f}"
            for row in rows[first : first + len(policies)]
        ]
        size = " ".join(map(str, rows[first]["size"]))
        table.add_row(size, str(rows[first]["sigma"]), *cells)
    console.print(table)


def measure_on_gpu(repeat: int) -> list[dict[str, object]]:
    """Plans of one summed load on the GPU: `adaptive` copies it to the host, `ensemble` packs on the GPU."""
    rows: list[dict[str, object]] = []
    for layers, experts, slots, groups, nodes, ranks in SIZES:
        topology = eplb.Topology(num_nodes=nodes, num_ranks=ranks, num_slots=slots, num_groups=groups)
        load = lognormal(layers, experts)
        on_gpu = load.cuda()
        for policy in ("adaptive", "ensemble"):
            planner, times = ours(policy), []
            for turn in range(repeat + 2):
                torch.cuda.synchronize()
                began = time.perf_counter()
                ids = planner(on_gpu, topology).cpu()
                if turn > 1:  # the first ones load what the GPU runs
                    times.append(time.perf_counter() - began)
            peak = eplb.rank_loads(load, eplb.Placement(ids, experts), topology).amax(2)
            rows.append(
                {
                    "size": [layers, experts, slots, groups, nodes, ranks],
                    "policy": policy,
                    "plan_ms": statistics.median(times) * 1e3,
                    "peak_over_mean": float(peak.mean() / load.sum(1).div(ranks).mean()),
                }
            )
    return rows


def show_on_gpu(console: Console, rows: list[dict[str, object]]) -> None:
    table = Table(title=f"Planning from one load on {torch.cuda.get_device_name()}")
    for column in ("size", "policy", "ms", "peak/mean"):
        table.add_column(column, no_wrap=True, justify="left" if column in ("size", "policy") else "right")
    for row in rows:
        table.add_row(
            " ".join(map(str, row["size"])),
            str(row["policy"]),
            f"{row['plan_ms']:.1f}",
            f"{row['peak_over_mean']:.4f}",
        )
    console.print(table)


def show_full(console: Console, rows: list[dict[str, object]]) -> None:
    table = Table(title="Full plans: 128 snapshots (32 at the first rebalance) and the placement in force")
    for column in ("size", "plan", "ms", "x vLLM"):
        table.add_column(column, no_wrap=True, justify="left" if column in ("size", "plan") else "right")
    for row in rows:
        ratio = row["time_over_vllm"]
        table.add_row(
            " ".join(map(str, row["size"])),
            str(row["plan"]),
            f"{row['plan_ms']:.1f}",
            "" if ratio is None else f"{ratio:.2f}",
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--few-slots", action="store_true", help="only loads with few slots a rank")
    arguments = parser.parse_args()
    repeat = arguments.repeat
    console = Console(width=110)
    eplb.warmup()
    if arguments.few_slots:
        few = measure_few_slots(repeat)
        show_few_slots(console, few)
        print(json.dumps({"benchmark": "plan", "few_slots": few}))
        return
    planners: dict[str, Planner] = {policy: ours(policy) for policy in POLICIES}
    if peers.available():
        planners["vLLM default"] = theirs
    rows = measure(planners, repeat)
    table = Table(title="Planning from one summed load (median of interleaved runs)")
    table.caption = "size: layers, experts, slots, groups, nodes, ranks"
    for column in ("size", "load", "policy", "ms", "x greedy", "peak/mean", "peak/bound"):
        table.add_column(column, no_wrap=True, justify="left" if column in ("size", "load") else "right")
    for row in rows:
        table.add_row(
            " ".join(map(str, row["size"])),
            str(row["load"]),
            str(row["policy"]),
            f"{row['plan_ms']:.1f}",
            f"{row['time_over_greedy']:.2f}",
            f"{row['peak_over_mean']:.4f}",
            f"{row['peak_over_bound']:.4f}",
        )
    console.print(table)
    full = measure_full(repeat)
    show_full(console, full)
    few = measure_few_slots(repeat)
    show_few_slots(console, few)
    if not peers.available():
        console.print("The peers' wheels are not there (make bench-peers): only our policies took part.")
    on_gpu = measure_on_gpu(repeat) if torch.cuda.is_available() else []
    if on_gpu:
        show_on_gpu(console, on_gpu)
    print(json.dumps({"benchmark": "plan", "rows": rows, "full": full, "few_slots": few, "on_gpu": on_gpu}))


if __name__ == "__main__":
    main()
