"""`eplb-plugin simulate`: policies side by side on a recorded or generated load."""

from __future__ import annotations

import json
from dataclasses import asdict

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from ..config import SimulateOptions
from ..folding import fold_decode, fold_prefill
from ..settings import Settings
from ..simulation import SimulationResult, policy_setup
from ..simulation import simulate as replay
from ..topology import Topology
from ..traces import LoadTrace, read_trace
from ..traffic import PROFILES, generate
from ..warmup import warmup
from . import arguments

__all__ = ["load_for", "simulate", "topology_for"]

_AUTO_INTERVALS = 8


def simulate(
    context: typer.Context,
    trace: arguments.Load,
    ranks: arguments.Ranks = None,
    slots: arguments.Slots = None,
    nodes: arguments.Nodes = None,
    groups: arguments.Groups = None,
    interval: arguments.Interval = None,
    policies: arguments.Policies = None,
    mode: arguments.Mode = None,
    batch: arguments.Batch = None,
    max_tokens: arguments.MaxTokens = None,
    steps: arguments.Steps = None,
    drift: arguments.Drift = None,
    seed: arguments.Seed = None,
    config: arguments.Config = None,
    as_json: arguments.AsJson = False,
) -> None:
    """Replay a load offline: what would each policy have gained, and what would it have moved?"""
    settings = arguments.settings_for(context)
    setups = [policy_setup(name, settings.planner) for name in settings.simulate.policies]
    errors = Console(stderr=True)
    with errors.status("reading the load, and loading the planner (the first time, it is compiled)"):
        load = load_for(trace, settings)
        warmup()
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
