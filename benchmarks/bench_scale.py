"""How planning time grows with the problem, and what sharding it over ranks saves.

    python benchmarks/bench_scale.py [--repeat 5]

From scratch: one summed load. Full: 16 snapshots and a placement in force. For dispatch: the same for
dispatch `balanced`, with 64 single steps. Divided by 8: what one of 8 ranks plans, an eighth of the layers.
Prints a table and, as the last line, one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

import eplb_plugin as eplb

# layers, experts, slots, ranks: each row doubles one thing.
SIZES = [
    (16, 256, 512, 64),
    (32, 256, 512, 64),
    (64, 256, 512, 64),
    (128, 256, 512, 64),
    (32, 256, 512, 128),
    (32, 512, 1024, 128),
    (32, 1024, 2048, 256),
    (32, 1024, 2048, 1024),
    (128, 1024, 2048, 1024),
]
SHARDS = 8


def traffic(snapshots: int, layers: int, experts: int) -> torch.Tensor:
    """[snapshots, layers, experts]: lognormal heat with noise from snapshot to snapshot."""
    generator = torch.Generator().manual_seed(0)
    heat = torch.empty(1, layers, experts).log_normal_(6, 0.8, generator=generator)
    noise = torch.empty(snapshots, layers, experts).log_normal_(0, 0.2, generator=generator)
    return (heat * noise).round()


def median_ms(job: Callable[[], object], repeat: int) -> float:
    times = []
    for _ in range(repeat):
        began = time.perf_counter()
        job()
        times.append(time.perf_counter() - began)
    return 1e3 * statistics.median(times)


def measure(size: tuple[int, int, int, int], repeat: int) -> dict[str, object]:
    layers, experts, slots, ranks = size
    topology = eplb.Topology(num_ranks=ranks, num_slots=slots)
    load = traffic(32, layers, experts)
    settled = eplb.plan(load[:16], topology).placement
    share = layers // SHARDS
    part = eplb.Placement(settled.physical_to_logical[:share], experts)
    balanced, single = eplb.PlannerOptions(dispatch="balanced"), traffic(64, layers, experts)
    for_dispatch = eplb.plan(load[:16], topology, settled, balanced, samples=single).placement
    part_for_dispatch = eplb.Placement(for_dispatch.physical_to_logical[:share], experts)
    return {
        "size": size,
        "scratch_ms": median_ms(lambda: eplb.plan(load.sum(0), topology), repeat),
        "full_ms": median_ms(lambda: eplb.plan(load[16:], topology, settled), repeat),
        "sharded_ms": median_ms(lambda: eplb.plan(load[16:, :share], topology, part), repeat),
        "dispatch_ms": median_ms(
            lambda: eplb.plan(load[16:], topology, for_dispatch, balanced, samples=single), repeat
        ),
        "dispatch_sharded_ms": median_ms(
            lambda: eplb.plan(
                load[16:, :share], topology, part_for_dispatch, balanced, samples=single[:, :share]
            ),
            repeat,
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=5)
    repeat = parser.parse_args().repeat
    eplb.warmup(dispatch="balanced")
    rows = [measure(size, repeat) for size in SIZES]
    table = Table(title="Planning time (median, ms)")
    plans = ("scratch", "full", f"full / {SHARDS}", "for dispatch", f"for dispatch / {SHARDS}")
    for column in ("layers", "experts", "slots", "ranks", *plans):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            *map(str, row["size"]),
            f"{row['scratch_ms']:.1f}",
            f"{row['full_ms']:.1f}",
            f"{row['sharded_ms']:.1f}",
            f"{row['dispatch_ms']:.0f}",
            f"{row['dispatch_sharded_ms']:.0f}",
        )
    Console(width=110).print(table)
    print(json.dumps({"benchmark": "scale", "shards": SHARDS, "rows": rows}))


if __name__ == "__main__":
    main()
