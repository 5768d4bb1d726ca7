"""How much planning in a thread slows the engine's Python thread down.

    python benchmarks/bench_lock.py [--seconds 4]

The main thread runs a loop of small tensor operations, as an engine's scheduler does, alone and while a
planner runs over and over in another thread; the three alternate. Prints a table and one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from collections.abc import Callable

import peers
import torch
from rich.console import Console
from rich.table import Table

import eplb_plugin as eplb
from eplb_plugin.offline.synthetic_traffic import generate

ROUNDS = 4


def step(tensor: torch.Tensor) -> None:
    """About what one step of a scheduler's bookkeeping costs."""
    for _ in range(20):
        tensor = (tensor * 1.0001).clamp_(max=10.0)


def step_times(seconds: float, planner: Callable[[], object] | None) -> list[float]:
    """Durations of the steps that fit into `seconds`, with `planner` running beside them."""
    stop = threading.Event()

    def plan_on() -> None:
        while planner is not None and not stop.is_set():
            planner()

    thread = threading.Thread(target=plan_on)
    thread.start()
    tensor, times = torch.ones(64), []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        step(tensor)
        times.append(time.perf_counter() - start)
    stop.set()
    thread.join()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=4.0)
    seconds = parser.parse_args().seconds / ROUNDS
    torch.set_num_threads(1)
    eplb.warmup(dispatch="balanced")
    topology = eplb.Topology(num_ranks=32, num_slots=288)
    load = generate("deepseek-v3", steps=128).load.double()
    window = torch.stack([part.sum(0) for part in load.tensor_split(64)])
    current = eplb.plan(load[:32].sum(0), topology).placement
    single, balanced = load[-64:], eplb.PlannerOptions(dispatch="balanced")
    planners: dict[str, Callable[[], object] | None] = {
        "nothing": None,
        "eplb-plugin, one load": lambda: eplb.plan(window.sum(0), topology),
        "eplb-plugin, 64 snapshots": lambda: eplb.plan(window, topology, current),
        "the same, for dispatch": lambda: eplb.plan(window, topology, current, balanced, samples=single),
    }
    if peers.available():
        planners["vLLM default"] = lambda: peers.vllm_default(window, topology, current)
    times: dict[str, list[float]] = {name: [] for name in planners}
    for _ in range(ROUNDS):
        for name, planner in planners.items():
            times[name] += step_times(seconds, planner)
    alone = statistics.median(times["nothing"])
    rows = [
        {
            "beside": name,
            "median_us": 1e6 * statistics.median(found),
            "slowdown_percent": 100 * (statistics.median(found) / alone - 1),
            "steps_share": len(found) / len(times["nothing"]),
        }
        for name, found in times.items()
    ]
    table = Table(title="A loop of small tensor operations beside a planner (interleaved)")
    for column in ("beside", "median step, us", "slower", "steps done, of alone"):
        table.add_column(column, justify="left" if column == "beside" else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            str(row["beside"]),
            f"{row['median_us']:.1f}",
            f"{row['slowdown_percent']:+.1f} %",
            f"{100 * float(str(row['steps_share'])):.0f} %",
        )
    console = Console(width=110)
    console.print(table)
    if not peers.available():
        console.print("The peers' wheels are not there (make bench-peers): vLLM's policy was left out.")
    print(json.dumps({"benchmark": "lock", "rows": rows}))


if __name__ == "__main__":
    main()
