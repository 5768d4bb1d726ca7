"""`eplb-plugin simulate`: policies side by side on a recorded or generated load."""

from __future__ import annotations

import json
from dataclasses import asdict

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from ..config.sources import COMMAND_LINE
from ..core.errors import ConfigError
from ..core.topology import Topology
from ..offline.dispatch_replay import find_split
from ..offline.simulation import SimulationResult, policy_setup
from ..offline.simulation import simulate as replay
from ..offline.traces import LoadTrace
from ..planning.planner import warmup
from . import arguments
from .console import compiling, counted, progress_bar, size_in, tell_left_out
from .loading import fit_interval, load_for, planner_for, recording_for, topology_for

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
    expert_mb: arguments.ExpertMb = None,
    policies: arguments.Policies = None,
    dispatches: arguments.Dispatches = None,
    expert_cost: arguments.ExpertCost = None,
    mode: arguments.Mode = None,
    batch: arguments.Batch = None,
    max_tokens: arguments.MaxTokens = None,
    steps: arguments.Steps = None,
    drift: arguments.Drift = None,
    seed: arguments.Seed = None,
    config: arguments.Config = None,
    as_json: arguments.AsJson = False,
) -> None:
    """Compare policies and dispatches offline on a load: the balancedness of each, and its moves."""
    settings = arguments.settings_for(context)
    for name in settings.simulate.policies:
        policy_setup(name, settings.planner)
    for name in settings.simulate.dispatches:
        find_split(name)
    # The even split alone is what every row shows anyway.
    judged = () if set(settings.simulate.dispatches) == {"even"} else settings.simulate.dispatches
    if not judged and settings.origins.get("simulate.expert_cost") == COMMAND_LINE:
        raise ConfigError("--expert-cost is for a dispatch beside even: add --dispatch balanced")
    errors = Console(stderr=True)
    with errors.status("reading the load"):
        recording, settings = recording_for(trace, settings)
        load = load_for(trace, settings, recording=recording)
    tell_left_out(errors, trace, recording)
    fitting = fit_interval(settings, load)
    options = fitting.rebalancer
    topology = topology_for(load, settings.simulate)
    planner = planner_for(load, topology, fitting)
    with compiling(errors, "loading the planner"):
        warmup(dispatch=settings.planner.dispatch)
    results: list[SimulationResult] = []
    with progress_bar(errors) as bar:
        for setup in (policy_setup(name, planner) for name in settings.simulate.policies):
            task = bar.add_task(f"{setup.name}: rebalances", total=None)
            results.append(
                replay(
                    load,
                    topology,
                    setup,
                    options.interval,
                    snapshots=options.snapshots,
                    history=options.history,
                    dispatches=judged,
                    expert_cost=settings.simulate.expert_cost,
                    seed=settings.simulate.seed,
                    progress=lambda done, total, task=task: bar.update(  # type: ignore[misc]
                        task, completed=done, total=total
                    ),
                )
            )
    shortened = None
    if recording is None and options.interval < settings.rebalancer.interval:
        shortened = settings.rebalancer.interval
    table = _table(load, topology, options.interval, shortened, settings.simulate.expert_cost, results)
    if planner.move_price != settings.planner.move_price:
        size = f"experts of {settings.simulate.expert_mb:g} MB and steps of {options.step_ms:g} ms"
        table.caption = f"{table.caption}. move_price is {planner.move_price:g}, for {size}"
    Console().print(table)
    if as_json:
        print(json.dumps([_plain(result) for result in results]))


def _plain(result: SimulationResult) -> dict[str, object]:
    content = asdict(result)
    for part in content["intervals"]:
        del part["placement"]
    if not result.dispatches:
        del content["dispatches"]
    return content


def _table(
    load: LoadTrace,
    topology: Topology,
    interval: int,
    shortened: int | None,
    expert_cost: int,
    results: list[SimulationResult],
) -> Table:
    rebalances = counted(len(results[0].intervals), "rebalance")
    every, scored = counted(round(interval * load.engine_steps), "step"), "steps"
    if load.samples is not None:
        scored = "recorded single steps"
    caption = f"{rebalances}, one every {every}, each scored on the {scored} after it"
    if shortened is not None:
        caption += f". The load is short for one every {shortened}; --interval sets another"
    if results[0].dispatches and load.samples is None:
        caption += (
            ". Each row of the load is taken for one batch: of sums over several steps, dispatch shows less "
            "than it gains"
        )
    if results[0].dispatches and expert_cost:
        caption += (
            ". Balancedness counts tokens; with expert_cost, balanced lowers the cost of the slowest "
            "rank instead, which is told as a fraction of that with the even split"
        )
    dispatches = bool(results[0].dispatches)
    table = Table(title=f"{load.name}: {size_in(load, topology)}", caption=caption)
    if dispatches:
        # With these, two more columns fit into 80.
        table.caption_justify, table.box, table.padding = "left", box.SIMPLE_HEAD, (0, 1, 0, 0)
    costs = dispatches and expert_cost > 0
    table.add_column("policy", no_wrap=dispatches)
    if dispatches:
        table.add_column("dispatch", no_wrap=True)
    shown = [
        "balancedness",
        "worst interval",
        *(["slowest rank"] if costs else []),
        "slots moved",
        "planning",
    ]
    for name in shown:
        table.add_column(name.replace(" ", "\n") if dispatches else name, justify="right", no_wrap=dispatches)
    for item in results:
        moved, planning = f"{item.moved_share:.1%}", f"{item.plan_ms:.1f} ms"
        if not dispatches:
            worst = min(part.balancedness for part in item.intervals)
            table.add_row(item.policy, f"{item.balancedness:.4f}", f"{worst:.4f}", moved, planning)
        for at, each in enumerate(item.dispatches):
            table.add_row(
                "" if at else item.policy,
                each.dispatch,
                f"{each.balancedness:.4f}",
                f"{min(each.intervals):.4f}",
                *([f"{each.cost_ratio:.3f}"] if costs else []),
                *(["", ""] if at else [moved, planning]),
            )
    return table
