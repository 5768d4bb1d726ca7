"""What recording loads costs: its share of a forward step, and the bytes it allocates per step.

    python benchmarks/bench_record.py [--tokens 256] [--steps 300]

One process serves the model of `eplb_plugin.integration.torch_moe`. Steps with and without recording
alternate in random order, so that whatever else the machine does hits both alike. Intervals have 1,000 steps,
16 of them kept as samples, as with `record: FOLDER`. The file of an interval is written beside serving; its
processor time is told as a share of the interval's steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from eplb_plugin import Placement, RebalancerOptions, Topology
from eplb_plugin.integration.torch_moe import MoEConfig, MoEModel
from eplb_plugin.runtime.load_window import IntervalLoad, LoadWindow
from eplb_plugin.runtime.recorder import Recorder

WARM_UP = 20
INTERVAL = 1000


@dataclass(frozen=True)
class Row:
    """Medians over the steps of one configuration; times in microseconds."""

    name: str
    tokens: int
    without_us: float
    with_us: float
    record_us: float
    bytes_after_first_step: int
    file_ms: float
    file_bytes: int

    @property
    def overhead_percent(self) -> float:
        """Time in `record` and `step` against that of a step without them."""
        return 100 * self.record_us / self.without_us

    @property
    def file_percent(self) -> float:
        """Processor time for the file of an interval against that of its steps."""
        return 100 * 1000 * self.file_ms / (INTERVAL * self.without_us)


class Unrecorded:
    """The recorder of the steps that do not record."""

    def record(self, layer: int, expert_ids: torch.Tensor, valid: torch.Tensor | None = None) -> None:
        pass

    def step(self, is_dummy: bool = False) -> None:
        pass


def allocated_bytes(model: MoEModel, tokens: int, steps: int = 10) -> int:
    """Bytes that recording allocated in all of `steps` steps, the first one before not counted."""
    config, window = model.config, model.rebalancer.window
    ids = torch.randint(
        config.num_logical, (tokens, config.top_k), generator=torch.Generator().manual_seed(1)
    )

    def step() -> None:
        for layer in range(config.num_layers):
            window.record(layer, ids)
        window.step()

    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        for _ in range(steps):
            step()
    return sum(max(0, event.self_cpu_memory_usage) for event in trace.events())


def measure(name: str, config: MoEConfig, tokens: int, steps: int) -> Row:
    """Time `steps` forward steps with and as many without recording, in one random order."""
    model = MoEModel(config, options=RebalancerOptions(interval=INTERVAL, mode="sync"))
    model.rebalancer.window = LoadWindow(
        config.num_layers, config.num_logical, interval=INTERVAL, samples=RebalancerOptions().samples
    )
    window, unrecorded = model.rebalancer.window, Unrecorded()
    generator = torch.Generator().manual_seed(0)
    batch = torch.randint(config.vocab, (tokens,), generator=generator)
    ids = torch.randint(config.num_logical, (tokens, config.top_k), generator=generator)
    order = torch.randperm(2 * (steps + WARM_UP), generator=generator) % 2
    seconds: dict[bool, list[float]] = {False: [], True: []}
    alone: list[float] = []
    for recording in order.bool().tolist():
        model.rebalancer.window = window if recording else unrecorded  # type: ignore[assignment]
        start = time.perf_counter()
        model.forward(batch)
        model.step()
        seconds[recording].append(time.perf_counter() - start)
        start = time.perf_counter()
        for layer in range(config.num_layers):
            window.record(layer, ids)
        window.step()
        if window.steps == INTERVAL:
            window.take()
        alone.append(time.perf_counter() - start)
    model.rebalancer.window = window
    medians = [statistics.median(times[WARM_UP:]) * 1e6 for times in (seconds[False], seconds[True], alone)]
    file_ms, file_bytes = write_files(config, model.rebalancer.topology)
    return Row(
        name, tokens, medians[0], medians[1], medians[2], allocated_bytes(model, tokens), file_ms, file_bytes
    )


def write_files(config: MoEConfig, topology: Topology, files: int = 10) -> tuple[float, int]:
    """Processor time of the recorder for an interval, in milliseconds, and the size of its file in bytes."""
    generator = torch.Generator().manual_seed(2)
    shape = config.num_layers, config.num_logical
    interval = IntervalLoad(
        torch.randint(40_000, (32, *shape), generator=generator),
        torch.randint(1_000, (16, *shape), generator=generator),
    )
    placement = Placement.default(*shape, topology.num_slots)
    with tempfile.TemporaryDirectory() as folder:
        recorder = Recorder(folder, 256)
        start = time.process_time()
        for _ in range(files):
            recorder.add(
                interval, placement, topology, expert_bytes=1.0, step_seconds=1.0, num_steps=INTERVAL
            )
            recorder.flush()
        seconds = time.process_time() - start
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
    return 1000 * seconds / files, size // files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--steps", type=int, default=300)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    configs = {
        "demo size": MoEConfig(),
        "64 experts, hidden 256": MoEConfig(hidden=256, expert_hidden=256, num_logical=64, top_k=6),
    }
    rows = [
        measure(name, config, tokens, arguments.steps)
        for name, config in configs.items()
        for tokens in arguments.tokens
    ]
    table = Table(title="What recording adds to a forward step (CPU, one thread, medians)")
    for column in (
        "model",
        "tokens",
        "step without, us",
        "with, us",
        "record + step, us",
        "share",
        "bytes/step",
        "file, ms",
        "file, share",
        "file, KB",
    ):
        table.add_column(column, justify="left" if column == "model" else "right")
    for row in rows:
        times = (f"{value:,.0f}" for value in (row.without_us, row.with_us, row.record_us))
        share = f"{row.overhead_percent:.2f} %"
        file = f"{row.file_ms:.1f}", f"{row.file_percent:.3f} %", f"{row.file_bytes / 1000:.0f}"
        table.add_row(row.name, str(row.tokens), *times, share, str(row.bytes_after_first_step), *file)
    Console(width=140).print(table)
    print(json.dumps([{**vars(row), "overhead_percent": round(row.overhead_percent, 3)} for row in rows]))


if __name__ == "__main__":
    main()
