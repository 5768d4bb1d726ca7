"""What balanced dispatch gains and costs: balance beside the linear program, time beside the even mapping.

    python benchmarks/bench_dispatch.py [--quick] [--traces ../shared/traces]

Four parts, each with a table, and one line of JSON at the end.
1. Sizes: generated traffic, judged on unseen steps, and the time of one layer. The dispatches take turns.
2. `torch_moe` on two processes over gloo: steps with dispatch even and balanced, in random order.
3. The real traces, if present: plans by the default policy, judged on unseen steps.
4. Decode of gpt-oss-20b with expert_cost=32: the cost of the slowest rank against the even split.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dispatch_steps import measure_model
from rich.console import Console
from rich.table import Table

import eplb_plugin as eplb
from eplb_plugin.core.balancedness import balancedness_of_peaks
from eplb_plugin.core.load import fold_steps
from eplb_plugin.dispatch.rank_costs import rank_costs
from eplb_plugin.dispatch.registry import Serving, find_dispatch
from eplb_plugin.dispatch.split_kernels import split_batches
from eplb_plugin.dispatch.tables import ReplicaTables
from eplb_plugin.formats.loads import read_trace
from eplb_plugin.offline.dispatch_replay import SPLITS
from eplb_plugin.offline.linear_program import best_split
from eplb_plugin.offline.synthetic_traffic import generate
from eplb_plugin.offline.token_replay import fold_decode, fold_prefill
from eplb_plugin.offline.traces import LoadTrace, TokenTrace

TRACES = Path(__file__).resolve().parent.parent.parent / "shared" / "traces"
PROFILES = {32: "gpt-oss-20b", 128: "qwen3-235b", 256: "deepseek-v3", 384: "kimi-k2.5"}
SIZES = ((32, 40, 8, 256), (128, 160, 16, 2048), (256, 288, 32, 4096), (256, 384, 128, 16384))
SNAPSHOTS = 32
PAIR = ("even", "balanced")
DECODE = {16: 0.80, 64: 0.90, 256: 0.98, 1024: 0.97}
"""Tokens of a step, and the cost of the slowest rank that is wanted, as a fraction of the even split's."""

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """Steps that are planned from, and steps that are judged.

    Attributes:
        window: steps before each plan; the next plan comes as many steps later.
        every: one of so many unseen steps is judged.
        wanted: balancedness that is wanted of `balanced`, and how much above that of `sampled`.
    """

    name: str
    trace: LoadTrace
    topology: eplb.Topology
    window: int
    every: int = 1
    wanted: tuple[float | None, float | None] = (None, None)

    def judged(self) -> Iterator[tuple[eplb.Placement, torch.Tensor]]:
        """Plans from scratch by the default policy, and unseen steps, int64 [steps, layers, logical]."""
        load = self.trace.load
        for cut in range(self.window, len(load) - self.every + 1, self.window):
            window = fold_steps(load[cut - self.window : cut], SNAPSHOTS)
            ahead = load[cut : cut + self.window : self.every]
            yield eplb.plan(window, self.topology).placement, ahead.to(torch.int64)


def balance(case: Case) -> dict[str, float]:
    """Balancedness of each dispatch over the judged steps.

    `even share`: in fractions of tokens, as the planner and `simulate` count them. `best`: of the linear
    program. `best whole`: its peaks, rounded up to whole tokens; no split of whole tokens has lower ones.
    """
    ranks = case.topology.num_ranks
    peaks: dict[str, list[torch.Tensor]] = {}
    means, shares = [], []
    for placement, steps in case.judged():
        means.append(steps.sum(2).double() / ranks)
        shares += [eplb.balancedness(step, placement, case.topology) for step in steps]
        for name, split in SPLITS.items():
            tokens = split(steps, placement, case.topology, 0, (0,))
            peaks.setdefault(name, []).append(rank_costs(tokens, case.topology, 0).amax(2).double())
        best = case.topology.by_rank(best_split(steps, placement, case.topology), 0.0).sum(3).amax(2)
        peaks.setdefault("best", []).append(best)
        peaks.setdefault("best whole", []).append((best - 1e-6).ceil())
    mean = torch.cat(means)
    found = {name: balancedness_of_peaks(mean, torch.cat(each)) for name, each in peaks.items()}
    return {"even share": statistics.fmean(shares), **found}


def size_case(experts: int, slots: int, ranks: int, tokens: int, quick: bool) -> Case:
    layers, every = (2, 32) if quick else (6, 16)
    trace = generate(PROFILES[experts], layers=layers, experts=experts, steps=512, tokens_per_step=tokens)
    name = f"{experts}, {slots}, {ranks}, {tokens}"
    return Case(name, trace, eplb.Topology(num_ranks=ranks, num_slots=slots), 256, every)


def choices(load: torch.Tensor, tokens: int, top_k: int) -> torch.Tensor:
    """Distinct experts of each token, drawn by their load [logical]: int64 [tokens, top_k]."""
    rng = np.random.default_rng(0)
    keys = np.log(load.numpy() + 1e-9) + rng.gumbel(size=(tokens, len(load)))
    return torch.from_numpy(np.argsort(-keys, 1)[:, :top_k].copy())


def layer_times(case: Case, tokens: int, rounds: int) -> dict[str, float]:
    """Microseconds of a layer: both dispatches of the same tokens, in turn, and the split alone."""
    placement, steps = next(case.judged())
    top_k = int(steps[0, 0].sum()) // tokens
    ids = choices(steps[0, 0].double(), tokens, top_k)
    made = {name: find_dispatch(name)(placement, case.topology, Serving()) for name in PAIR}
    tables = ReplicaTables(placement, case.topology)
    (replicas, *_) = tables.prepare(placement.physical_to_logical[:1], [0]).values()
    counts = torch.bincount(ids.flatten(), minlength=placement.num_logical).expand(16, 1, -1).contiguous()
    quota = np.zeros((16, 1, case.topology.num_slots), np.int64)
    ranks = case.topology.rank_of_slot().numpy()
    rows = [table[None].numpy() for table in replicas]

    def split() -> None:
        split_batches(counts.numpy(), *rows, ranks, case.topology.num_ranks, 0, quota)

    jobs: dict[str, Callable[[], object]] = {
        name: lambda dispatch=dispatch: dispatch.physical(0, ids) for name, dispatch in made.items()
    }
    jobs["split"] = split
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(rounds + 5):
        for name, job in jobs.items():
            began = time.perf_counter()
            job()
            if turn >= 5:
                seconds[name].append(time.perf_counter() - began)
    medians = {name: 1e6 * statistics.median(each) for name, each in seconds.items()}
    medians["split"] /= 16
    return {**medians, "ratio": medians["balanced"] / medians["even"]}


def measure_sizes(quick: bool) -> Rows:
    rows: Rows = []
    for experts, slots, ranks, tokens in SIZES:
        case = size_case(experts, slots, ranks, tokens, quick)
        times = layer_times(case, tokens, 50 if quick else 400)
        rows.append({"size": [experts, slots, ranks, tokens], "balancedness": balance(case), "us": times})
    return rows


def tokens_of(path: Path) -> TokenTrace:
    trace = read_trace(path)
    assert isinstance(trace, TokenTrace)
    return trace


def shuffled(trace: TokenTrace, tokens: int) -> LoadTrace:
    """Steps of `tokens` tokens of a trace in random order: traffic of one mix."""
    order = np.random.default_rng(0).permutation(trace.num_tokens)
    ids = trace.topk_ids[order[: len(order) // tokens * tokens]].reshape(
        -1, tokens, trace.num_layers, trace.top_k
    )
    load = torch.zeros(len(ids), trace.num_layers, trace.num_experts, dtype=torch.int32)
    flat = torch.from_numpy(ids.astype(np.int64)).transpose(1, 2).flatten(2)
    return LoadTrace(load.scatter_add_(2, flat, torch.ones_like(flat, dtype=torch.int32)), trace.name)


def trace_cases(folder: Path, quick: bool) -> Iterator[Case]:
    every = 32 if quick else 8
    decode = tokens_of(folder / "gpt_oss_20b_decode_tokens.npz")
    steps = fold_decode(decode, 256, steps=768 if quick else 2048)
    eight, four = eplb.Topology(num_ranks=8, num_slots=40), eplb.Topology(num_ranks=4, num_slots=36)
    yield Case("gpt-oss-20b decode, 256 tokens, 8 ranks, 40 slots", steps, eight, 256, every, (0.965, 0.03))
    yield Case("the same, 4 ranks, 36 slots", steps, four, 256, every, (0.996, None))
    prompts = tokens_of(folder / "deepseek_v2_lite_prefill_tokens.npz")
    wide = eplb.Topology(num_ranks=8, num_slots=72)
    mixed = shuffled(prompts, 256)
    yield Case("V2-Lite shuffled, 256 tokens, 8 ranks, 72 slots", mixed, wide, 32, 1, (0.960, None))
    yield Case("V2-Lite prefill in file order, 512 tokens", fold_prefill(prompts, 512), wide, 16)


def measure_traces(folder: Path, quick: bool) -> Rows:
    return [
        {"trace": case.name, "wanted": case.wanted, "balancedness": balance(case)}
        for case in trace_cases(folder, quick)
    ]


def measure_decode(folder: Path, quick: bool, expert_cost: int = 32) -> Rows:
    """The slowest rank with `expert_cost`, against the even split of whole tokens and that of all steps."""
    decode, rows = tokens_of(folder / "gpt_oss_20b_decode_tokens.npz"), []
    topology = eplb.Topology(num_ranks=8, num_slots=40)
    for tokens, wanted in DECODE.items():
        case = Case("", fold_decode(decode, tokens, steps=512 if quick else 2048), topology, 256)
        peaks: dict[str, list[torch.Tensor]] = {"even": [], "tokens alone": [], "balanced": []}
        for placement, steps in case.judged():
            for name, dispatch, cost in (
                ("even", "even", 0),
                ("tokens alone", "balanced", 0),
                ("balanced", "balanced", expert_cost),
            ):
                split = SPLITS[dispatch](steps, placement, topology, cost, (0,))
                peaks[name].append(rank_costs(split, topology, expert_cost).amax(2))
        even, alone, balanced = (torch.cat(each) for each in peaks.values())
        rows.append(
            {
                "tokens": tokens,
                "expert_cost": expert_cost,
                "tokens_alone": float(alone.sum() / even.sum()),
                "balanced": float(balanced.sum() / even.sum()),
                "wanted": wanted,
                "worst_step": float((balanced.sum(1) / even.sum(1)).max()),
                "layers_above_even": int((balanced > even).sum()),
                "layers": balanced.numel(),
            }
        )
    return rows


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> Table:
    made = Table(title=title, caption=caption, caption_justify="left")
    for at, column in enumerate(columns):
        made.add_column(column, justify="right" if at else "left")
    for row in rows:
        made.add_row(*row)
    return made


def figures(found: dict[str, float]) -> list[str]:
    names = ("even share", "even", "sampled", "balanced", "best whole", "best")
    return [*(f"{found[name]:.4f}" for name in names), f"{100 * (found['best'] - found['balanced']):.2f}"]


FIGURES = ("even share", "even", "sampled", "balanced", "best whole", "best", "points below")
CAPTION = (
    "Balancedness of unseen steps. even share: in fractions of tokens; best: linear program; best whole:\n"
    "its peaks rounded up to whole tokens; points below: balanced below best"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer steps and rounds")
    parser.add_argument("--traces", type=Path, default=TRACES, help="folder of the real traces")
    arguments = parser.parse_args()
    quick, folder = arguments.quick, arguments.traces
    torch.set_num_threads(1)
    console = Console(width=120)
    eplb.warmup()
    sizes = measure_sizes(quick)
    names = [", ".join(map(str, row["size"])) for row in sizes]
    first = "experts, slots, ranks, tokens"
    lines = [[name, *figures(row["balancedness"])] for name, row in zip(names, sizes, strict=True)]
    console.print(table("Generated traffic", (first, *FIGURES), lines, CAPTION))
    lines = [
        [
            name,
            *(f"{row['us'][key]:,.0f}" for key in ("even", "balanced", "split")),
            f"{row['us']['ratio']:.2f}",
        ]
        for name, row in zip(names, sizes, strict=True)
    ]
    columns = (first, "even, us", "balanced, us", "its split, us", "balanced / even")
    console.print(table("Time of a layer (CPU, one thread, medians of alternating calls)", columns, lines))

    model = measure_model(quick)
    lines = [
        [
            row["model"],
            str(row["tokens"]),
            *(f"{row['step_us'][each]:,.0f}" for each in PAIR),
            f"{row['slower']:+.1%}",
            f"{row['more_work']:+.1%}",
            *(f"{row['dispatch_us_per_layer'][each]:,.0f}" for each in PAIR),
        ]
        for row in model
    ]
    columns = (
        "model",
        "tokens",
        "even, us",
        "balanced, us",
        "slower",
        "CPU time",
        "dispatch even",
        "balanced",
    )
    note = (
        "slower: median of pairs. CPU time: of all threads of a rank; other processes do not lengthen it.\n"
        "dispatch: microseconds a layer, with the all-gather of counts and the wait for the other rank"
    )
    console.print(table("A step of torch_moe, two ranks over gloo", columns, lines, note))

    traces, decode = [], []
    if folder.is_dir():
        traces, decode = measure_traces(folder, quick), measure_decode(folder, quick)
        lines = [
            [
                row["trace"],
                *figures(row["balancedness"]),
                "" if row["wanted"][0] is None else f"{row['wanted'][0]:.3f}",
            ]
            for row in traces
        ]
        console.print(table("Real traces", ("trace", *FIGURES, "wanted"), lines, CAPTION))
        lines = [
            [
                str(row["tokens"]),
                *(f"{row[key]:.3f}" for key in ("tokens_alone", "balanced", "wanted", "worst_step")),
                f"{row['layers_above_even']} of {row['layers']}",
            ]
            for row in decode
        ]
        columns = ("tokens a step", "expert_cost 0", "expert_cost 32", "wanted", "worst step", "layers above")
        title = "gpt-oss-20b decode, 8 ranks, 40 slots: cost of the slowest rank, that of the even split = 1"
        console.print(table(title, columns, lines))
    else:
        console.print(f"{folder} is not there: parts 3 and 4, on real traces, were left out.")
    print(
        json.dumps(
            {"benchmark": "dispatch", "sizes": sizes, "torch_moe": model, "traces": traces, "decode": decode}
        )
    )


if __name__ == "__main__":
    main()
