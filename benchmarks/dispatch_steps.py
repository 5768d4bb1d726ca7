"""A part of `bench_dispatch.py`: what dispatch `balanced` adds to a step of `torch_moe`, on two processes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import eplb_plugin as eplb
from eplb_plugin.cli.demo.ranks import run_ranks
from eplb_plugin.integration.torch_moe import MoEConfig, MoEModel

__all__ = ["measure_model"]

PAIR = ("even", "balanced")


def serve(
    rank: int, send: Callable[[Any], None], config: MoEConfig, slots: int, tokens: int, steps: int
) -> None:
    """Steps of two copies of a model that differ in dispatch, in one random order on both ranks."""
    topology = eplb.Topology(num_ranks=2, num_slots=slots)
    models = {
        name: MoEModel(config, topology, options=eplb.RebalancerOptions(interval=2**30, dispatch=name))
        for name in PAIR
    }
    spent = [0.0]

    def timed(physical_and_received: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(layer: int, ids: torch.Tensor) -> Any:
            began = time.perf_counter()
            found = physical_and_received(layer, ids)
            spent[0] += time.perf_counter() - began
            return found

        return wrapped

    for model in models.values():
        model.rebalancer.physical_and_received = timed(model.rebalancer.physical_and_received)  # type: ignore[method-assign]
    generator, order = torch.Generator().manual_seed(rank), torch.Generator().manual_seed(7)
    seconds: dict[str, list[float]] = {name: [] for name in PAIR}
    work: dict[str, list[float]] = {name: [] for name in PAIR}
    inside: dict[str, list[float]] = {name: [] for name in PAIR}
    for turn in range(steps + 20):
        batch = torch.randint(config.vocab, (tokens,), generator=generator)
        for at in torch.randperm(2, generator=order).tolist():
            spent[0] = 0.0
            busy, began = time.process_time(), time.perf_counter()
            models[PAIR[at]].forward(batch)
            models[PAIR[at]].step()
            if turn >= 20:
                seconds[PAIR[at]].append(time.perf_counter() - began)
                work[PAIR[at]].append(time.process_time() - busy)
                inside[PAIR[at]].append(spent[0])
    for model in models.values():
        model.rebalancer.close()
    if rank == 0:
        send((seconds, work, inside))


def measure_model(quick: bool) -> list[dict[str, Any]]:
    configs = {
        "demo size": (MoEConfig(), 40),
        "64 experts, hidden 256": (MoEConfig(hidden=256, expert_hidden=256, num_logical=64, top_k=6), 80),
    }
    rows: list[dict[str, Any]] = []
    for name, (config, slots) in configs.items():
        for tokens in (64, 512):
            seconds, work, inside = ({each: [] for each in PAIR} for _ in range(3))
            # Where a process and its memory happen to lie changes a ratio by 3 %.
            for _ in range(1 if quick else 7):
                ((_, measured),) = list(run_ranks(serve, 2, (config, slots, tokens, 60), time_limit=600))
                for kept, new in zip((seconds, work, inside), measured, strict=True):
                    for each in PAIR:
                        kept[each] += new[each]
            even, balanced = (1e6 * statistics.median(seconds[each]) for each in PAIR)
            # Both serve the same batch one after the other: their ratio leaves out what the machine does.
            slower = statistics.median(
                after / before for before, after in zip(seconds["even"], seconds["balanced"], strict=True)
            )
            spent = {each: 1e6 * statistics.median(inside[each]) / config.num_layers for each in PAIR}
            rows.append(
                {
                    "model": name,
                    "tokens": tokens,
                    "step_us": {"even": even, "balanced": balanced},
                    "slower": slower - 1,
                    "more_work": sum(work["balanced"]) / sum(work["even"]) - 1,
                    "dispatch_us_per_layer": spent,
                }
            )
    return rows
