"""What recording loads costs: its share of a forward step, and the bytes it allocates per step.

    python benchmarks/bench_record.py [--tokens 256] [--steps 300]

One process serves the model of `eplb_plugin.integration.torch_moe`. Steps with and without recording
alternate in random order, so that whatever else the machine does hits both alike.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from eplb_plugin import RebalancerOptions
from eplb_plugin.integration.torch_moe import MoEConfig, MoEModel

WARM_UP = 20


@dataclass(frozen=True)
class Row:
    """Medians over the steps of one configuration; times in microseconds."""

    name: str
    tokens: int
    without_us: float
    with_us: float
    record_us: float
    bytes_after_first_step: int

    @property
    def overhead_percent(self) -> float:
        """Time in `record` and `step` against that of a step without them."""
        return 100 * self.record_us / self.without_us


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
    model = MoEModel(config, options=RebalancerOptions(interval=1_000_000))
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
        alone.append(time.perf_counter() - start)
    model.rebalancer.window = window
    medians = [statistics.median(times[WARM_UP:]) * 1e6 for times in (seconds[False], seconds[True], alone)]
    return Row(name, tokens, medians[0], medians[1], medians[2], allocated_bytes(model, tokens))


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
    ):
        table.add_column(column, justify="left" if column == "model" else "right")
    for row in rows:
        times = (f"{value:,.0f}" for value in (row.without_us, row.with_us, row.record_us))
        share = f"{row.overhead_percent:.2f} %"
        table.add_row(row.name, str(row.tokens), *times, share, str(row.bytes_after_first_step))
    Console(width=110).print(table)
    print(json.dumps([{**vars(row), "overhead_percent": round(row.overhead_percent, 3)} for row in rows]))


if __name__ == "__main__":
    main()
