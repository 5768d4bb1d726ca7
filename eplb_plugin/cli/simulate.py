"""`eplb-plugin simulate`: policies side by side on a recorded or generated load."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from ..folding import fold_decode, fold_prefill
from ..settings import Settings, SimulateOptions, load_settings
from ..simulation import POLICIES, SimulationResult, policy_setup
from ..simulation import simulate as replay
from ..topology import Topology
from ..traces import LoadTrace, read_trace
from ..traffic import PROFILES, generate

__all__ = ["load_for", "simulate", "topology_for"]

_AUTO_INTERVALS = 8


def simulate(
    trace: Annotated[
        str,
        typer.Argument(
            help=f"A recorded load of any format, a token trace, or generated traffic: {', '.join(PROFILES)}."
        ),
    ],
    ranks: Annotated[int | None, typer.Option(help="Ranks (GPUs) of the expert-parallel group.")] = None,
    slots: Annotated[int | None, typer.Option(help="Physical experts over all ranks.")] = None,
    nodes: Annotated[int | None, typer.Option(help="Nodes that the ranks are spread over.")] = None,
    groups: Annotated[int | None, typer.Option(help="Groups of experts per layer.")] = None,
    interval: Annotated[int | None, typer.Option(help="Steps between two rebalances.")] = None,
    policy: Annotated[
        list[str] | None, typer.Option(help=f"Repeat to compare several of: {', '.join(POLICIES)}.")
    ] = None,
    mode: Annotated[str | None, typer.Option(help="Token traces: decode or prefill.")] = None,
    batch: Annotated[int | None, typer.Option(help="Decode: requests in flight.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Prefill: most tokens of one step.")] = None,
    steps: Annotated[int | None, typer.Option(help="Decode and generated traffic: steps.")] = None,
    drift: Annotated[float | None, typer.Option(help="How strongly the mix of topics changes.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the replay or of the traffic.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with options.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="End with one line of JSON.")] = False,
) -> None:
    """Replay a load offline: what would each policy have gained, and what would it have moved?"""
    settings = load_settings(
        config,
        {
            "simulate.ranks": ranks,
            "simulate.slots": slots,
            "simulate.nodes": nodes,
            "simulate.groups": groups,
            "rebalancer.interval": interval,
            "simulate.policies": policy or None,
            "simulate.mode": mode,
            "simulate.batch": batch,
            "simulate.max_tokens": max_tokens,
            "simulate.steps": steps,
            "simulate.drift": drift,
            "simulate.seed": seed,
        },
    )
    setups = [policy_setup(name, settings.planner) for name in settings.simulate.policies]
    errors = Console(stderr=True)
    with errors.status("reading the load"):
        load = load_for(trace, settings)
    topology = topology_for(load, settings.simulate)
    options = settings.rebalancer
    results: list[SimulationResult] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("rebalances"))
    with Progress(*columns, console=errors, transient=True) as bar:
        for setup in setups:
            task = bar.add_task(setup.name, total=None)
            results.append(
                replay(
                    load,
                    topology,
                    setup,
                    options.interval,
                    snapshots=options.snapshots,
                    history=options.history,
                    progress=lambda done, total, task=task: bar.update(  # type: ignore[misc]
                        task, completed=done, total=total
                    ),
                )
            )
    Console().print(_table(load, topology, options.interval, results))
    if as_json:
        print(json.dumps([asdict(result) for result in results]))


def load_for(source: str, settings: Settings) -> LoadTrace:
    """The load that `source`, a file or the name of a traffic profile, stands for.

    Raises:
        TraceError: the file is not a trace, or the options do not fit it.
    """
    options = settings.simulate
    steps = options.steps or _AUTO_INTERVALS * settings.rebalancer.interval
    if source in PROFILES:
        return generate(
            source,
            steps=steps,
            tokens_per_step=options.tokens_per_step,
            topics=options.topics,
            drift=options.drift,
            period=options.period,
            seed=options.seed,
        )
    trace = read_trace(source)
    if isinstance(trace, LoadTrace):
        return trace
    if options.mode == "prefill":
        return fold_prefill(trace, options.max_tokens)
    return fold_decode(
        trace, options.batch, steps=steps, drift=options.drift, period=options.period, seed=options.seed
    )


def topology_for(load: LoadTrace, options: SimulateOptions) -> Topology:
    """The topology that the options describe; without `slots`, one spare slot per rank.

    Raises:
        TopologyError: the numbers do not fit together, or there are more experts than slots.
    """
    slots = options.slots or (-(-load.num_experts // options.ranks) + 1) * options.ranks
    topology = Topology(
        num_nodes=options.nodes, num_ranks=options.ranks, num_slots=slots, num_groups=options.groups
    )
    topology.check_experts(load.num_experts)
    return topology


def _table(load: LoadTrace, topology: Topology, interval: int, results: list[SimulationResult]) -> Table:
    rebalances = len(results[0].intervals)
    table = Table(
        title=f"{load.name}: {load.num_steps} steps, {load.num_layers} layers, {load.num_experts} experts in "
        f"{topology.num_slots} slots on {topology.num_ranks} ranks",
        caption=f"{rebalances} rebalances, one every {interval} steps, each scored on the steps after it",
    )
    table.add_column("policy")
    for name in ("balancedness", "worst interval", "slots moved", "planning"):
        table.add_column(name, justify="right")
    for item in results:
        table.add_row(
            item.policy,
            f"{item.balancedness:.4f}",
            f"{min(part.balancedness for part in item.intervals):.4f}",
            f"{item.moved_share:.1%}",
            f"{item.plan_ms:.1f} ms",
        )
    return table
