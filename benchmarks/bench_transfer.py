"""How fast weights move, beside the same bytes between the same ranks by `batch_isend_irecv` alone.

    python benchmarks/bench_transfer.py [--ranks 2] [--repeats 15]

Raw leaves the bytes in a buffer. So does our staging: it lays out the buffer, votes, sends, and verifies the
fingerprints of what arrived. All ranks begin at once with either. "whole" is all of a rebalance between its
plan and its report: migration batches, staging, the vote, the decision in the store, and writing to the
slots. No raw transfer includes that last part, so it is also timed alone: raw plus that is the bound of
"whole". All of them alternate in one run over gloo. Small moves vary most and are repeated more often. Prints
a table and one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

import eplb_plugin as eplb
from eplb_plugin.cli.demo.ranks import run_ranks
from eplb_plugin.runtime import relocation
from eplb_plugin.runtime.control.scheduling import AtOnce
from eplb_plugin.runtime.reports import DraftReport
from eplb_plugin.runtime.weights.expert_weights import ExpertWeights

SLOTS_PER_RANK = 8
MOVED = 2e9  # bytes per rank and case that are moved at least, however few a move has
CASES = [
    # layers, KiB of an expert's largest tensor, staging MiB
    (4, 256, 64),
    (16, 256, 64),
    (8, 2048, 64),
    (8, 8192, 80),
    (4, 8192, 256),
]


def rotate(placement: eplb.Placement, ranks: int) -> eplb.Placement:
    """Half of the slots of every rank get what the previous rank has there."""
    rows = placement.physical_to_logical.view(-1, ranks, SLOTS_PER_RANK).clone()
    half = SLOTS_PER_RANK // 2
    rows[:, :, :half] = rows[:, :, :half].roll(1, dims=1)
    return eplb.Placement(rows.flatten(1), placement.num_logical)


def raw(
    weights: ExpertWeights, received: list[list[torch.Tensor]], rank: int, ranks: int
) -> Callable[[], None]:
    """Send what `rotate` moves from where it is, and receive into memory that was used before."""

    def run() -> None:
        operations = []
        for rows, targets in zip(weights.rows, received, strict=True):
            for row, target in zip(rows, targets, strict=True):
                for slot in range(len(target)):
                    operations.append(dist.P2POp(dist.isend, row[slot], (rank + 1) % ranks))
                    operations.append(dist.P2POp(dist.irecv, target[slot], (rank - 1) % ranks))
        for work in dist.batch_isend_irecv(operations):
            work.wait()

    return run


def copies(weights: ExpertWeights, received: list[list[torch.Tensor]]) -> Callable[[], None]:
    """Write what raw received to slots, as the end of a rebalance does."""

    def run() -> None:
        for rows, sources in zip(weights.rows, received, strict=True):
            for row, source in zip(rows, sources, strict=True):
                for slot in range(len(source)):
                    row[slot].copy_(source[slot])

    return run


@contextmanager
def staged_together() -> Iterator[list[float]]:
    """Ranks begin to stage at once, as they begin with raw: none waits for the plan of another, or for its
    writes after a batch. Gives the seconds that staging took, without that."""
    reserve, stage = relocation.reserve, relocation.stage
    seconds: list[float] = []
    reserved = False

    def timed(function: Callable[..., Any], *arguments: Any) -> Any:
        nonlocal reserved
        # Between the memory of all batches and the first of them, ranks wait as they do.
        if function is reserve or not reserved:
            dist.barrier()
        reserved = function is reserve
        start = time.perf_counter()
        result = function(*arguments)
        seconds.append(time.perf_counter() - start)
        return result

    with (
        mock.patch.object(relocation, "reserve", partial(timed, reserve)),
        mock.patch.object(relocation, "stage", partial(timed, stage)),
    ):
        yield seconds


def measure(rank: int, send: Callable[[Any], None], ranks: int, repeats: int) -> None:
    """Sends, from the first rank, (case, seconds by what they were for, staging bytes, bytes per rank)."""
    for case in CASES:
        layers, kib, staging_mib = case
        tensors = [
            [torch.zeros(SLOTS_PER_RANK, kib * 256), torch.zeros(SLOTS_PER_RANK, 64)] for _ in range(layers)
        ]
        topology = eplb.Topology(num_ranks=ranks, num_slots=ranks * SLOTS_PER_RANK)
        options = eplb.RebalancerOptions(mode="sync", staging_mib=staging_mib)
        balancer = eplb.Rebalancer(topology, layers, topology.num_slots, weights=tensors, options=options)
        context = balancer._context
        received = [
            [torch.empty_like(row[: SLOTS_PER_RANK // 2]) for row in rows] for rows in context.weights.rows
        ]
        baseline = raw(context.weights, received, rank, ranks)
        copy = copies(context.weights, received)
        times: dict[str, list[float]] = {"raw": [], "staging": [], "whole": [], "copy": []}
        num_bytes = layers * SLOTS_PER_RANK // 2 * context.weights.expert_bytes[0]
        for repeat in range(max(repeats, round(MOVED / num_bytes)) + 1):
            for turn, name in enumerate(times):
                goal = rotate(balancer.placement, ranks).physical_to_logical
                move = partial(
                    relocation.relocate,
                    context,
                    len(times) * repeat + turn,
                    goal,
                    AtOnce(),
                    DraftReport(),
                )
                dist.barrier()
                start = time.perf_counter()
                if name == "staging":
                    with staged_together() as staging:
                        move()
                    passed = sum(staging)
                else:
                    {"raw": baseline, "copy": copy, "whole": move}[name]()
                    passed = time.perf_counter() - start
                # Of the rank that took longest; this itself is not measured.
                seconds = torch.tensor([passed])
                dist.all_reduce(seconds, dist.ReduceOp.MAX)
                if repeat:
                    times[name].append(float(seconds[0]))
        used = context.staging.num_bytes
        assert used <= staging_mib << 20
        balancer.close()
        if rank == 0:
            send((case, times, used, num_bytes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    table = Table(
        title=f"{options.ranks} ranks over gloo, half of all slots change rank (medians)",
        caption="GB/s of each rank. bound: raw, then from the buffer to the slots, over raw.",
        caption_justify="left",
    )
    for column in (
        "layers",
        "KiB",
        "MiB",
        "used",
        "MB",
        "raw",
        "staging",
        "/ raw",
        "whole",
        "/ raw",
        "bound",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    rows = []
    for _, (case, times, used, num_bytes) in run_ranks(
        measure, options.ranks, (options.ranks, options.repeats), time_limit=900
    ):
        speeds = {name: num_bytes / statistics.median(seconds) / 1e9 for name, seconds in times.items()}
        ratios = {
            name: statistics.median(a / b for a, b in zip(times["raw"], times[name], strict=True))
            for name in ("staging", "whole")
        }
        ratios["bound"] = statistics.median(
            raw / (raw + copy) for raw, copy in zip(times["raw"], times["copy"], strict=True)
        )
        row = {
            "layers": case[0],
            "tensor_kib": case[1],
            "staging_mib": case[2],
            "used_mib": used / 2**20,
            "mb": num_bytes / 1e6,
            **{f"{name}_gb_s": speed for name, speed in speeds.items()},
            **{f"{name}_ratio": ratio for name, ratio in ratios.items()},
        }
        rows.append(row)
        table.add_row(
            *(str(number) for number in case),
            f"{row['used_mib']:.1f}",
            f"{row['mb']:.0f}",
            f"{speeds['raw']:.2f}",
            f"{speeds['staging']:.2f}",
            f"{100 * ratios['staging']:.0f} %",
            f"{speeds['whole']:.2f}",
            f"{100 * ratios['whole']:.0f} %",
            f"{100 * ratios['bound']:.0f} %",
        )
    Console(width=110).print(table)
    print(json.dumps({"benchmark": "transfer", "rows": rows}))


if __name__ == "__main__":
    main()
