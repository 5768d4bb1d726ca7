"""`eplb-plugin simulate`: policies side by side on a recorded or generated load."""

from __future__ import annotations

import json
from dataclasses import asdict

import typer
from rich.console import Console
from rich.table import Table

from ..core.topology import Topology
from ..offline.simulation import SimulationResult, policy_setup
from ..offline.simulation import simulate as replay
from ..offline.traces import LoadTrace
from ..planning.planner import warmup
from . import arguments
from .console import compiling, counted, progress_bar, size_in
from .loading import fit_interval, load_for, topology_for

__all__ = ["simulate"]


def simulate(
    context: typer.Context,
    trace: arguments.Load,
    ranks: arguments.Ranks = None,
    slots: arguments.Slots = None,
    rank_slots: arguments.RankSlots = None,
    nodes: arguments.Nodes = None,
    groups: arguments.Groups = None,
    interval: arguments.Interval = None,
    move_price: arguments.MovePrice = None,
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
    """Compare policies offline on a load: the balancedness that each reaches, and its moves."""
    settings = arguments.settings_for(context)
    setups = [policy_setup(name, settings.planner) for name in settings.simulate.policies]
    errors = Console(stderr=True)
    with errors.status("reading the load"):
        load = load_for(trace, settings)
    options = fit_interval(settings, load).rebalancer
    topology = topology_for(load, settings.simulate)
    with compiling(errors, "loading the planner"):
        warmup()
    results: list[SimulationResult] = []
    with progress_bar(errors) as bar:
        for setup in setups:
            task = bar.add_task(f"{setup.name}: rebalances", total=None)
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
    shortened = settings.rebalancer.interval if options.interval < settings.rebalancer.interval else None
    Console().print(_table(load, topology, options.interval, shortened, results))
    if as_json:
        print(json.dumps([asdict(result) for result in results]))


def _table(
    load: LoadTrace, topology: Topology, interval: int, shortened: int | None, results: list[SimulationResult]
) -> Table:
    rebalances = counted(len(results[0].intervals), "rebalance")
    caption = f"{rebalances}, one every {counted(interval, 'step')}, each scored on the steps after it"
    if shortened is not None:
        caption += f". The load is short for one every {shortened}; --interval sets another"
    table = Table(title=f"{load.name}: {size_in(load, topology)}", caption=caption)
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
