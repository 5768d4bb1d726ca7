"""Policies side by side on traffic that they have not seen: balance, moves and planning time.

    python benchmarks/bench_policies.py [--quick] [--seeds 6] [--plot docs/tradeoff.png]

Replays traces offline: every interval is planned from the steps before it and scored on the steps after it.
Uses the package's generator, the real traces in ../shared/traces if present, and the policies of vLLM and
vllm-ascend after `make bench-peers`. Prints a table per trace, a table of means with several seeds, and one
line of JSON. The balancedness of one seed varies by a third of a point with any change.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import peers
import torch
from rich.console import Console
from rich.table import Table

import eplb_plugin as eplb
from eplb_plugin.formats.loads import read_trace
from eplb_plugin.offline.simulation import POLICIES, PolicySetup, SimulationResult, policy_setup, simulate
from eplb_plugin.offline.synthetic_traffic import generate
from eplb_plugin.offline.token_replay import fold_decode, fold_prefill
from eplb_plugin.offline.traces import LoadTrace, TokenTrace

TRACES = Path(__file__).resolve().parent.parent.parent / "shared" / "traces"
PRICES = (0.0, 0.001, 0.003, 0.009, 0.02, 0.05)
PLOTTED = "glm-5.2 mixed"


@dataclass(frozen=True)
class Case:
    """A trace and where it runs."""

    name: str
    trace: LoadTrace
    topology: eplb.Topology
    interval: int


def steady_poisson(layers: int, seed: int) -> LoadTrace:
    """Traffic without drift: 256 experts, lognormal with sigma 0.65, 65,536 tokens in independent steps."""
    generator = torch.Generator().manual_seed(seed)
    rate = torch.empty(layers, 256, dtype=torch.float64).log_normal_(0, 0.65, generator=generator)
    rate *= 65536 / rate.sum(1, keepdim=True)
    load = torch.poisson(rate.expand(1024, -1, -1).contiguous(), generator=generator)
    return LoadTrace(load.to(torch.int32), "Poisson (generated)")


def cases(console: Console, quick: bool, seed: int = 0) -> Iterator[Case]:
    layers = 6 if quick else 12
    thirty_two = eplb.Topology(num_ranks=32, num_slots=288)
    yield Case("steady, Poisson", steady_poisson(layers, seed), thirty_two, 128)
    for profile, drift, ranks in (
        ("deepseek-v3", 1.5, 32),
        ("glm-5.2", 1.5, 16),
        ("glm-5.2", 0.2, 16),
        ("qwen3-235b", 1.5, 16),
    ):
        kind = "mixed" if drift > 1 else "steady"
        trace = generate(profile, layers=layers, steps=1024, drift=drift, period=512, seed=seed)
        slots = 160 if profile.startswith("qwen") else 288
        yield Case(f"{profile} {kind}", trace, eplb.Topology(num_ranks=ranks, num_slots=slots), 128)
        if profile.startswith("deepseek"):
            nodes = eplb.Topology(num_nodes=4, num_ranks=ranks, num_slots=slots, num_groups=8)
            yield Case(f"{profile} {kind}, 4 nodes", trace, nodes, 128)
    if not TRACES.is_dir():
        console.print(f"{TRACES} is not there: the real traces were left out.")
        return
    tokens = read_trace(TRACES / "gpt_oss_20b_decode_tokens.npz")
    assert isinstance(tokens, TokenTrace)
    eight = eplb.Topology(num_ranks=8, num_slots=40)
    yield Case("gpt-oss-20b decode, mixed", fold_decode(tokens, 256, steps=2560, seed=seed), eight, 256)
    yield Case(
        "gpt-oss-20b decode, steady", fold_decode(tokens, 256, steps=2560, drift=0.0, seed=seed), eight, 256
    )
    wide = eplb.Topology(num_ranks=16, num_slots=48)
    yield Case("gpt-oss-20b decode, 16 ranks", fold_decode(tokens, 256, steps=2560, seed=seed), wide, 256)
    if seed > 0:
        return  # prompts come in file order, whatever the seed
    prompts = read_trace(TRACES / "deepseek_v2_lite_prefill_tokens.npz")
    assert isinstance(prompts, TokenTrace)
    topology = eplb.Topology(num_ranks=8, num_slots=72)
    yield Case("deepseek-v2-lite prefill", fold_prefill(prompts, 512), topology, 4)


def policies(num_nodes: int) -> list[PolicySetup]:
    """All policies, made anew for each trace, because some keep a history. Peers that know no nodes take part
    only where there is one."""

    def scratch(
        window: torch.Tensor, topology: eplb.Topology, current: eplb.Placement | None
    ) -> eplb.Placement:
        return eplb.plan(window, topology).placement

    ours = [policy_setup(name) for name in POLICIES]
    ours.append(PolicySetup("adaptive from scratch", scratch))
    if not peers.available():
        return ours
    default = PolicySetup("vLLM default", peers.vllm_default, snapshots=1, history=1)
    if num_nodes > 1:
        return [default, *ours]
    return [
        default,
        PolicySetup("FlashLB", peers.FlashLB(), history=1),
        PolicySetup("FlashLB, same history", peers.FlashLB()),
        PolicySetup("SwiftBalancer", peers.SwiftBalancer(), snapshots=1, history=1),
        *ours,
    ]


def priced(price: float) -> PolicySetup:
    options = eplb.PlannerOptions(move_price=price)
    return PolicySetup(f"price {price}", policy_setup("adaptive", options).policy)


def settled_share(result: SimulationResult, case: Case) -> float:
    """Share of slots moved per rebalance, without the first, which leaves the engine's own placement."""
    cells = case.trace.num_layers * case.topology.num_slots
    later = [item.moves / cells for item in result.intervals[1:]]
    return sum(later) / max(1, len(later))


def run(case: Case) -> list[dict[str, object]]:
    results = []
    for setup in policies(case.topology.num_nodes):
        results.append(simulate(case.trace, case.topology, setup, case.interval))
    reference = next((r for r in results if r.policy == "vLLM default"), None) or next(
        r for r in results if r.policy == "greedy"
    )
    return [
        {
            "trace": case.name,
            "policy": result.policy,
            "balancedness": result.balancedness,
            "gain_points": 100 * (result.balancedness - reference.balancedness),
            "moved_share": result.moved_share,
            "moved_ratio": result.moved_share / max(reference.moved_share, 1e-12),
            "moved_share_settled": settled_share(result, case),
            "plan_ms": result.plan_ms,
            "time_ratio": result.plan_ms / max(reference.plan_ms, 1e-9),
        }
        for result in results
    ]


def show(console: Console, case: Case, rows: list[dict[str, object]]) -> None:
    reference = "vLLM default" if any(r["policy"] == "vLLM default" for r in rows) else "greedy"
    table = Table(
        title=f"{case.name}: {case.trace.num_layers} layers, {case.trace.num_experts} experts in "
        f"{case.topology.num_slots} slots on {case.topology.num_ranks} ranks",
        caption=f"gain, x: against {reference}; later: slots moved without the first rebalance",
    )
    for column in ("policy", "balancedness", "gain", "moved", "x", "later", "plan ms", "x"):
        table.add_column(column, justify="left" if column == "policy" else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            str(row["policy"]),
            f"{row['balancedness']:.4f}",
            f"{row['gain_points']:+.1f}",
            f"{100 * row['moved_share']:.1f} %",
            f"{row['moved_ratio']:.3f}",
            f"{100 * row['moved_share_settled']:.1f} %",
            f"{row['plan_ms']:.1f}",
            f"{row['time_ratio']:.2f}",
        )
    console.print(table)


def show_means(console: Console, rows: list[dict[str, object]]) -> None:
    """Balancedness and slots moved, means over the seeds of each trace."""
    table = Table(title="Means over the seeds")
    for column in ("trace", "policy", "balancedness", "moved"):
        table.add_column(column, justify="right" if column in ("balancedness", "moved") else "left")
    for trace, policy in dict.fromkeys((row["trace"], row["policy"]) for row in rows):
        found = [row for row in rows if (row["trace"], row["policy"]) == (trace, policy)]
        balance, moved = (
            statistics.fmean(float(str(row[key])) for row in found) for key in ("balancedness", "moved_share")
        )
        table.add_row(str(trace), str(policy), f"{balance:.4f}", f"{100 * moved:.1f} %")
    console.print(table)


def plot(path: Path, case: Case, rows: list[dict[str, object]]) -> None:
    """Balancedness against moves: our planner for several prices, the others as points."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    curve = [simulate(case.trace, case.topology, priced(price), case.interval) for price in PRICES]
    figure, axes = pyplot.subplots(figsize=(7, 4.2), dpi=150)
    share = [100 * result.moved_share for result in curve]
    axes.plot(share, [r.balancedness for r in curve], "o-", color="#0072b2", label="adaptive, by move_price")
    for price, x, result in zip(PRICES, share, curve, strict=True):
        axes.annotate(
            f"{price:g}", (x, result.balancedness), textcoords="offset points", xytext=(4, -12), fontsize=7
        )
    colours = ("#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#888888")
    marks = iter(zip("sD^vPX*", colours, strict=True))
    for row in rows:
        if row["policy"] in ("adaptive", "static", "adaptive from scratch"):
            continue
        mark, colour = next(marks)
        axes.plot(
            100 * row["moved_share"], row["balancedness"], mark, color=colour, label=row["policy"], ms=7
        )
    axes.set_xscale("log")
    axes.set_xticks([2, 5, 10, 20, 50, 100], ["2", "5", "10", "20", "50", "100"])
    axes.minorticks_off()
    axes.set_xlabel("slots that get another expert per rebalance (%)")
    axes.set_ylabel("balancedness on the unseen next window")
    axes.set_title(
        f"{case.name} traffic, {case.topology.num_ranks} ranks: further up and left is better", fontsize=10
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False, loc="best")
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer layers")
    parser.add_argument("--seeds", type=int, default=1, help="how many draws of each trace")
    parser.add_argument("--plot", type=Path, help=f"write the trade-off on {PLOTTED} as a PNG")
    arguments = parser.parse_args()
    console = Console(width=110)
    eplb.warmup()
    if not peers.available():
        console.print("The peers' wheels are not there (make bench-peers): only our policies take part.")
    rows: list[dict[str, object]] = []
    for seed in range(arguments.seeds):
        for case in cases(console, arguments.quick, seed):
            found = run(case)
            show(console, case, found)
            if seed == 0 and case.name == PLOTTED and arguments.plot is not None:
                plot(arguments.plot, case, found)
            rows += [{**row, "seed": seed} for row in found]
    if arguments.seeds > 1:
        show_means(console, rows)
    print(json.dumps({"benchmark": "policies", "rows": rows}))


if __name__ == "__main__":
    main()
