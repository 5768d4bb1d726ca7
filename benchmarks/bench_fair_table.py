"""The fair table of SGLang's dispatch `static`, beside SGLang's own and the even split that plans assume.

    python benchmarks/bench_fair_table.py [--quick]

First plans for lognormal loads of 24 layers. Ranks have equally many tokens, so a table is exact: each rank
sends its part of an expert to one slot. Prints a table and, last, one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

import eplb_plugin as eplb
from eplb_plugin.dispatch.shares import nearest_shares
from eplb_plugin.planning.fair_table import FairTable, fair_table, plan_fair_table

LAYERS = 24
CASES = [(256, 16, 2, 0.81), (128, 16, 2, 0.81), (128, 16, 2, 2.59), (256, 32, 4, 0.81)]
REDUNDANT = 32


class Draw(NamedTuple):
    """Balancedness of one draw under each dispatch, and how long the fair table took."""

    even: float
    sglang: float
    fair: float
    fixed: float
    blind: float
    milliseconds: float


def measure(experts: int, ranks: int, nodes: int, sigma: float, seed: int) -> Draw:
    topology = eplb.Topology(num_nodes=nodes, num_ranks=ranks, num_slots=experts + REDUNDANT)
    generator = torch.Generator().manual_seed(seed)
    load = (torch.randn(LAYERS, experts, generator=generator, dtype=torch.float64) * sigma).exp()
    load = 1e6 * load / load.sum(1, keepdim=True)
    planned = eplb.plan(load, topology).placement

    def of(table: FairTable) -> float:
        return eplb.balancedness(load, table.placement, topology, table.shares)

    begin = time.perf_counter()
    table = plan_fair_table(load, topology, planned, None, eplb.PlannerOptions())
    milliseconds = 1e3 * (time.perf_counter() - begin)
    return Draw(
        even=eplb.balancedness(load, planned, topology),
        sglang=eplb.balancedness(load, planned, topology, nearest_shares(planned, topology)),
        fair=of(table),
        fixed=of(fair_table(planned, topology, load)),
        blind=of(fair_table(planned, topology)),
        milliseconds=milliseconds,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="3 draws in place of 20")
    draws = 3 if parser.parse_args().quick else 20
    measure(*CASES[0], seed=0)  # compiles
    table = Table(title=f"Balancedness, mean of {draws} draws; worst: least draw")
    for name in ("case", "even split", "SGLang", "fair", "worst", "fixed placement", "no load", "ms"):
        table.add_column(name, justify="left" if name == "case" else "right")
    results = []
    for case in CASES:
        experts, ranks, nodes, sigma = case
        measured = [measure(*case, seed=seed) for seed in range(draws)]
        means = [statistics.mean(column) for column in zip(*measured, strict=True)][:-1]
        worst, loss = min(each.fair for each in measured), max(each.even - each.fair for each in measured)
        milliseconds = statistics.median(each.milliseconds for each in measured)
        name = f"{experts} experts, {ranks} ranks, {nodes} nodes, sigma {sigma}"
        row = [f"{means[0]:.4f}", *(f"{mean:.3f}" for mean in means[1:3]), f"{worst:.3f}"]
        table.add_row(name, *row, *(f"{mean:.3f}" for mean in means[3:]), f"{milliseconds:.1f}")
        results.append(dict(zip(Draw._fields[:-1], means, strict=True)))
        results[-1] |= {"case": name, "worst_loss": loss, "milliseconds": milliseconds}
    Console(width=120).print(table)
    print(json.dumps({"benchmark": "fair_table", "draws": draws, "results": results}))


if __name__ == "__main__":
    main()
