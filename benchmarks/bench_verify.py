"""Cost of verification: per moved expert, beside a copy of its bytes, and per rank at the start.

    python benchmarks/bench_verify.py [--layers 2] [--repeats 20] [--device cpu]

Several experts take turns, so that none is in the cache from the last time. Copies and fingerprints
alternate, so that other work of the machine slows both alike.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import torch
from rich.console import Console
from rich.table import Table

from eplb_plugin import Placement, Topology
from eplb_plugin.runtime.control.rank_group import RankGroup
from eplb_plugin.runtime.verify.fingerprints import Coverage, ExpertFingerprints
from eplb_plugin.runtime.weights.expert_weights import ExpertWeights
from eplb_plugin.runtime.weights.staging import Arrival

SLOTS = 9  # of one rank
COVERAGES: tuple[Coverage, ...] = ("sampled", "all")


@dataclass(frozen=True)
class Shape:
    """One expert: for each tensor, its shape and dtype."""

    name: str
    tensors: tuple[tuple[tuple[int, ...], torch.dtype], ...]


SHAPES = (
    Shape(
        "DeepSeek-V3, fp8 and scales",
        (
            *[((2048, 7168), torch.float8_e4m3fn)] * 2,
            ((7168, 2048), torch.float8_e4m3fn),
            *[((16, 56), torch.float32)] * 2,
            ((56, 16), torch.float32),
        ),
    ),
    Shape("DeepSeek-V3, bf16", (*[((2048, 7168), torch.bfloat16)] * 2, ((7168, 2048), torch.bfloat16))),
    Shape("Qwen3-30B-A3B, bf16", (((1536, 2048), torch.bfloat16), ((2048, 768), torch.bfloat16))),
    Shape("demo, fp32 with a scale", (*[((128, 64), torch.float32)] * 3, ((), torch.float32))),
)


@dataclass(frozen=True)
class Row:
    """Medians; `verify: off` costs nothing."""

    name: str
    mib: float
    sampled_us: float
    all_us: float
    copy_us: float
    all_gbs: float
    copy_gbs: float
    start_sampled_ms: float
    """Per layer, for all slots of one rank."""
    start_all_ms: float


def seconds(action: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def copy(rows: list[torch.Tensor], staged: list[torch.Tensor]) -> None:
    for target, row in zip(staged, rows, strict=True):
        target.copy_(row)


def measure(shape: Shape, layers: int, repeats: int, device: torch.device) -> Row:
    """Copy and fingerprint the experts of a rank's slots in turn."""
    topology = Topology(num_ranks=1, num_slots=SLOTS)
    tensors = [
        [
            torch.randint(0, 256, (SLOTS, *size, dtype.itemsize), dtype=torch.uint8, device=device)
            .view(dtype)
            .squeeze(-1)
            for size, dtype in shape.tensors
        ]
        for _ in range(layers)
    ]
    weights = ExpertWeights(tensors, topology)
    placement = Placement.default(layers, SLOTS, SLOTS)
    group = RankGroup(None, device, alone=True)
    starts: dict[Coverage, list[float]] = {coverage: [] for coverage in COVERAGES}
    prints: dict[Coverage, ExpertFingerprints] = {}
    for coverage in COVERAGES:
        for _ in range(3):
            started = time.perf_counter()
            prints[coverage] = ExpertFingerprints.make(weights, placement, topology, group, coverage)
            starts[coverage].append(time.perf_counter() - started)
    staged = [torch.empty_like(row[0]) for row in weights.rows[0]]
    times: dict[str, list[float]] = {"copy": [], "sampled": [], "all": []}
    for turn in range(repeats):
        layer, slot = turn % layers, turn % SLOTS
        rows = [row[slot] for row in weights.rows[layer]]
        times["copy"].append(seconds(partial(copy, rows, staged), device))
        for coverage in COVERAGES:
            check = partial(prints[coverage].wrong_arrivals, [Arrival(layer, slot, slot, rows)])
            times[coverage].append(seconds(check, device))
    sampled, everything, copied = (statistics.median(times[name]) for name in ("sampled", "all", "copy"))
    size = weights.expert_bytes[0]
    return Row(
        shape.name,
        size / 2**20,
        sampled * 1e6,
        everything * 1e6,
        copied * 1e6,
        size / everything / 1e9,
        size / copied / 1e9,
        *(1e3 * statistics.median(starts[coverage]) / layers for coverage in COVERAGES),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [
        measure(shape, arguments.layers, arguments.repeats, torch.device(arguments.device))
        for shape in SHAPES
    ]
    table = Table(title=f"Verifying one moved expert ({arguments.device}, one thread, medians)")
    table.add_column("expert")
    for column in ("MiB", "sampled, us", "all, us", "copy, us", "all, GB/s", "copy, GB/s"):
        table.add_column(column, justify="right")
    for column in ("sampled", "all"):
        table.add_column(f"start, {column},\nms per layer", justify="right")
    for row in rows:
        table.add_row(
            row.name,
            f"{row.mib:.2f}",
            *(f"{value:,.0f}" for value in (row.sampled_us, row.all_us, row.copy_us)),
            *(f"{value:.1f}" for value in (row.all_gbs, row.copy_gbs)),
            *(f"{value:,.2f}" for value in (row.start_sampled_ms, row.start_all_ms)),
        )
    Console(width=140).print(table)
    print(json.dumps([asdict(row) for row in rows]))


if __name__ == "__main__":
    main()
