"""How fast weights move, beside the same bytes between the same ranks by `batch_isend_irecv` alone.

    python benchmarks/bench_transfer.py [--ranks 2] [--repeats 7]

Ours includes all that a rebalance does between its plan and its end: staging, fingerprints, votes, the
decision in the store, and writing to the slots. Both alternate in one run over gloo. Prints a table and one
line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

import eplb_plugin as eplb
from eplb_plugin.cli.ranks import run_ranks
from eplb_plugin.runtime.moving import Move
from eplb_plugin.runtime.pace import AtOnce
from eplb_plugin.runtime.weights import ExpertWeights

SLOTS_PER_RANK = 8
CASES = [
    # layers, KiB of an expert's largest tensor, staging MiB
    (4, 256, 64),
    (16, 256, 64),
    (8, 2048, 64),
    (4, 8192, 64),
    (4, 8192, 256),
]


def rotate(placement: eplb.Placement, ranks: int) -> eplb.Placement:
    """Half of the slots of every rank get what the previous rank has there."""
    rows = placement.physical_to_logical.view(-1, ranks, SLOTS_PER_RANK).clone()
    half = SLOTS_PER_RANK // 2
    rows[:, :, :half] = rows[:, :, :half].roll(1, dims=1)
    return eplb.Placement(rows.flatten(1), placement.num_logical)


def raw(weights: ExpertWeights, layers: int, rank: int, ranks: int) -> Callable[[], None]:
    """Send what `rotate` moves from where it is, and receive into memory that was used before."""
    half = SLOTS_PER_RANK // 2
    received = [[torch.empty_like(row[:half]) for row in rows] for rows in weights.rows]

    def run() -> None:
        operations = []
        for layer in range(layers):
            for row, target in zip(weights.rows[layer], received[layer], strict=True):
                for slot in range(half):
                    operations.append(dist.P2POp(dist.isend, row[slot], (rank + 1) % ranks))
                    operations.append(dist.P2POp(dist.irecv, target[slot], (rank - 1) % ranks))
        for work in dist.batch_isend_irecv(operations):
            work.wait()

    return run


def measure(rank: int, send: Callable[[Any], None], ranks: int, repeats: int) -> None:
    """Sends, from the first rank, (case, raw seconds, our seconds, staging bytes, bytes per rank)."""
    for case in CASES:
        layers, kib, staging_mib = case
        tensors = [
            [torch.zeros(SLOTS_PER_RANK, kib * 256), torch.zeros(SLOTS_PER_RANK, 64)] for _ in range(layers)
        ]
        topology = eplb.Topology(num_ranks=ranks, num_slots=ranks * SLOTS_PER_RANK)
        options = eplb.RebalancerOptions(mode="sync", staging_mib=staging_mib)
        balancer = eplb.Rebalancer(topology, layers, topology.num_slots, weights=tensors, options=options)
        parts = balancer._parts
        baseline = raw(parts.weights, layers, rank, ranks)
        times: dict[str, list[float]] = {"raw": [], "ours": []}
        for repeat in range(repeats + 1):
            for name in ("raw", "ours"):
                old = balancer.placement
                dist.barrier()
                start = time.perf_counter()
                if name == "raw":
                    baseline()
                else:
                    now = old.physical_to_logical.clone()
                    move = Move(parts, repeat, now, old.num_logical, AtOnce(), lambda phase: None)
                    move.run(rotate(old, ranks).physical_to_logical)
                dist.barrier()
                if repeat:
                    times[name].append(time.perf_counter() - start)
        used = parts.staging.num_bytes
        assert used <= staging_mib << 20
        num_bytes = layers * SLOTS_PER_RANK // 2 * parts.weights.expert_bytes(0)
        balancer.close()
        if rank == 0:
            send((case, times["raw"], times["ours"], used, num_bytes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    table = Table(title=f"{options.ranks} ranks over gloo, half of all slots change rank (medians)")
    for column in (
        "layers",
        "KiB",
        "staging MiB",
        "used MiB",
        "MB per rank",
        "raw GB/s",
        "ours GB/s",
        "ours / raw",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    rows = []
    for _, (case, raw_times, our_times, used, num_bytes) in run_ranks(
        measure, options.ranks, (options.ranks, options.repeats), time_limit=900
    ):
        ratio = statistics.median(a / b for a, b in zip(raw_times, our_times, strict=True))
        row = {
            "layers": case[0],
            "tensor_kib": case[1],
            "staging_mib": case[2],
            "used_mib": used / 2**20,
            "mb": num_bytes / 1e6,
            "raw_gb_s": num_bytes / statistics.median(raw_times) / 1e9,
            "ours_gb_s": num_bytes / statistics.median(our_times) / 1e9,
            "ratio": ratio,
        }
        rows.append(row)
        table.add_row(
            str(case[0]),
            str(case[1]),
            str(case[2]),
            f"{row['used_mib']:.1f}",
            f"{row['mb']:.0f}",
            f"{row['raw_gb_s']:.2f}",
            f"{row['ours_gb_s']:.2f}",
            f"{100 * ratio:.0f} %",
        )
    Console(width=110).print(table)
    print(json.dumps({"benchmark": "transfer", "rows": rows}))


if __name__ == "__main__":
    main()
