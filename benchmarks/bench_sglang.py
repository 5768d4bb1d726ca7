"""Our algorithm beside two of SGLang's own, each called by SGLang's own function on the same counts.

    make bench-sglang            (python benchmarks/bench_sglang.py [--quick] where SGLang is installed)

Generated traffic is recorded for an interval of steps, an algorithm plans from these counts as SGLang's ring
holds them, and its map is scored on the steps of the next interval, which it has not seen. The first interval
runs on SGLang's map at the start and is not scored. Prints a table per case and, last, one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from rich.console import Console
from rich.table import Table

import eplb_plugin as eplb
from eplb_plugin.offline.synthetic_traffic import generate
from eplb_plugin.offline.traces import LoadTrace

INTERVAL = 128
INTERVALS = 8


@dataclass(frozen=True)
class Case:
    """Traffic and where it runs. `groups` as SGLang gives them: None where routing is not group-limited."""

    name: str
    trace: LoadTrace
    topology: eplb.Topology
    groups: int | None = None


def cases(quick: bool) -> Iterator[Case]:
    layers = 4 if quick else 12

    def traffic(profile: str, drift: float) -> LoadTrace:
        return generate(profile, layers=layers, steps=INTERVAL * INTERVALS, drift=drift, period=512)

    hosts = {"num_nodes": 4, "num_groups": 8}
    yield Case(
        "deepseek-v3 mixed, 4 nodes",
        traffic("deepseek-v3", 1.5),
        eplb.Topology(num_ranks=32, num_slots=288, **hosts),
        groups=8,
    )
    yield Case("glm-5.2 mixed", traffic("glm-5.2", 1.5), eplb.Topology(num_ranks=16, num_slots=288))
    yield Case("glm-5.2 steady", traffic("glm-5.2", 0.2), eplb.Topology(num_ranks=16, num_slots=288))
    yield Case("qwen3-235b mixed", traffic("qwen3-235b", 1.5), eplb.Topology(num_ranks=16, num_slots=160))


def algorithms(case: Case) -> list[str]:
    theirs = ["deepseek", "deepseek_vec"]
    if case.groups is not None:
        theirs = [f"{name}_hierarchical" for name in theirs]
    return [*theirs, "eplb_plugin"]


def run(case: Case, name: str) -> dict[str, object]:
    """One algorithm over all intervals; as in a server, each plan starts from the map of the one before."""
    from sglang.srt.eplb import eplb_algorithms
    from sglang.srt.eplb.expert_location import set_global_expert_location_metadata

    from eplb_plugin.integration.sglang import plugin as sglang_plugin

    sglang_plugin.balancer_of.cache_clear()  # a server of its own: no history from the last case
    trace, topology = case.trace, case.topology
    current = eplb.Placement.default(trace.num_layers, trace.num_experts, topology.num_slots)
    seconds, moves, scores = [], [], []
    for start in range(INTERVAL, trace.num_steps, INTERVAL):
        in_force = SimpleNamespace(physical_to_logical_map_cpu=current.physical_to_logical)
        set_global_expert_location_metadata(in_force, allow_overwrite=True)
        counts = trace.load[start - INTERVAL : start].to(torch.int32)
        began = time.perf_counter()
        physical_to_logical, _, _ = eplb_algorithms.rebalance_experts(
            tokens_per_expert=counts,
            num_physical_experts=topology.num_slots,
            num_local_physical_experts=topology.slots_per_rank,
            num_groups=case.groups,
            num_nodes=topology.num_nodes,
            algorithm=eplb_algorithms.compute_algorithm(name, case.groups, topology.num_nodes),
        )
        seconds.append(time.perf_counter() - began)
        planned = eplb.Placement(physical_to_logical, trace.num_experts)
        moves.append(int(eplb.count_moves(current, planned, topology).sum()))
        scores.append(eplb.balancedness(trace.load[start : start + INTERVAL], planned, topology))
        current = planned
    cells = trace.num_layers * topology.num_slots
    return {
        "case": case.name,
        "algorithm": name,
        "balancedness": statistics.fmean(scores),
        "moved_share": statistics.fmean(moves) / cells,
        "moved_share_settled": statistics.fmean(moves[1:]) / cells,
        "plan_ms": 1000 * statistics.median(seconds),
    }


def show(console: Console, case: Case, rows: list[dict[str, object]]) -> None:
    table = Table(
        title=f"{case.name}: {case.trace.num_layers} layers, {case.trace.num_experts} experts in "
        f"{case.topology.num_slots} slots on {case.topology.num_ranks} ranks",
        caption="balancedness of the unseen next interval; slots moved, later: without the first rebalance",
    )
    for column in ("algorithm", "balancedness", "moved", "later", "plan ms"):
        table.add_column(column, justify="left" if column == "algorithm" else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            str(row["algorithm"]),
            f"{row['balancedness']:.4f}",
            f"{100 * row['moved_share']:.1f} %",
            f"{100 * row['moved_share_settled']:.1f} %",
            f"{row['plan_ms']:.1f}",
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer layers")
    arguments = parser.parse_args()
    from sglang.srt.plugins import load_plugins
    from sglang.version import __version__

    load_plugins()
    eplb.warmup()
    console = Console(width=110)
    rows: list[dict[str, object]] = []
    for case in cases(arguments.quick):
        found = [run(case, name) for name in algorithms(case)]
        show(console, case, found)
        rows += found
    print(json.dumps({"benchmark": "sglang", "sglang": __version__, "rows": rows}))


if __name__ == "__main__":
    main()
