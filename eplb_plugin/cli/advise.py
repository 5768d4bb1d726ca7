"""`eplb-plugin advise`: the gain of balancing for a load, and the best redundant experts and interval."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from ..advisor.advice import Advice, Rated, busy_layers
from ..advisor.advice import advise as sweep
from ..advisor.assumptions import STEP_MS, assumed_cost, size_of_expert, step_time
from ..advisor.dispatch import DispatchGain
from ..advisor.machine import Machine, model_preset
from ..advisor.rules import how_to_enable, when_not
from ..advisor.trial import TrialCache
from ..advisor.verdict import is_worth_it, verdict
from ..config.options import PlannerOptions
from ..config.sources import cache_folder
from ..core.errors import ConfigError
from ..dispatch.accelerators import ACCELERATORS
from ..offline.traces import LoadTrace
from ..planning.planner import warmup
from . import arguments
from .arguments import option
from .console import compiling, counted, progress_bar, size_of
from .loading import load_for, recording_for

__all__ = ["advise"]

_STEPS = 1024


def advise(
    context: typer.Context,
    trace: arguments.Load,
    model: Annotated[
        str | None, typer.Option(help="Model with the size of its experts, such as deepseek-v3.")
    ] = None,
    expert_mb: Annotated[
        float | None, option("simulate.expert_mb", meaning="Size of one expert in MB, for other models.")
    ] = None,
    ranks: arguments.Ranks = None,
    nodes: arguments.Nodes = None,
    groups: arguments.Groups = None,
    bandwidth: Annotated[
        float, typer.Option(help="GB/s of a GPU within its node, per direction (NVLink of H100: about 400).")
    ] = 400.0,
    node_bandwidth: Annotated[
        float, typer.Option(help="GB/s of a GPU to other nodes, per direction (400 Gbit/s: about 45).")
    ] = 45.0,
    accelerator: Annotated[
        str | None,
        typer.Option(help=f"Accelerator, by default the one found: {', '.join(ACCELERATORS)}."),
    ] = None,
    expert_cost: Annotated[
        int | None,
        option(
            "simulate.expert_cost",
            meaning="Least cost of a replica in use, in tokens; by default from model and accelerator.",
        ),
    ] = None,
    tokens: arguments.Tokens = None,
    message_us: arguments.MessageUs = None,
    step_ms: Annotated[
        float | None,
        typer.Option(
            help=f"Duration of one engine step in milliseconds; by default as recorded, or {STEP_MS:g}."
        ),
    ] = None,
    redundant: Annotated[list[int] | None, typer.Option(help="Redundant experts to try; repeatable.")] = None,
    intervals: Annotated[
        list[int] | None, typer.Option("--interval", help="Steps between two rebalances to try; repeatable.")
    ] = None,
    prices: Annotated[
        list[str] | None, typer.Option("--move-price", help="Price of moves to try, or auto; repeatable.")
    ] = None,
    mode: arguments.Mode = None,
    batch: arguments.Batch = None,
    max_tokens: arguments.MaxTokens = None,
    steps: Annotated[
        int | None, typer.Option(help=f"Decode and generated traffic: steps ({_STEPS} by default).")
    ] = None,
    drift: arguments.Drift = None,
    config: arguments.Config = None,
    as_json: arguments.AsJson = False,
) -> None:
    """Say whether balancing is worth it for a load, with which settings, and how reliable that is."""
    settings = arguments.settings_for(context)
    if settings.simulate.steps is None:
        settings = settings.replaced("simulate.steps", _STEPS)
    above_zero = {"--bandwidth": bandwidth, "--node-bandwidth": node_bandwidth}
    above_zero["--step-ms"] = STEP_MS if step_ms is None else step_ms
    for flag, value in {"--expert-mb": 1.0 if expert_mb is None else expert_mb, **above_zero}.items():
        if not 0 < value < float("inf"):
            raise ConfigError(f"{flag}: {value:g} is not above 0")
    for count in redundant or ():
        if count < 0:
            raise ConfigError(f"--redundant: {count} is below 0")
    for interval in intervals or ():
        arguments.check_value("--interval", "rebalancer.interval", interval)
    for price in prices or ():
        arguments.check_value("--move-price", "planner.move_price", price)
    if expert_mb is None and model is None:
        expert_mb = settings.simulate.expert_mb
    if model is not None and expert_mb is not None:
        raise ConfigError(f"--model {model} and --expert-mb {expert_mb:g} both give the size of an expert")
    if model is not None:
        model_preset(model)
    errors = Console(stderr=True)
    with errors.status("reading the load"):
        recording, settings = recording_for(trace, settings)
        load = load_for(trace, settings, recording=recording)
    size = size_of_expert(trace, model, expert_mb, load, recording)
    preset = size.preset
    if preset is not None and preset.experts != load.num_experts:
        raise ConfigError(f"{size.name} has {preset.experts} experts, {load.name} {load.num_experts}")
    cost = assumed_cost(settings, size.name, preset, accelerator)
    step = step_time(step_ms, recording)
    with compiling(errors, "loading the planner"):
        warmup(dispatch="balanced")
    options = settings.simulate
    groups = options.groups
    if preset is not None and "simulate.groups" not in settings.origins:
        groups = preset.groups
    machine = Machine(
        ranks=options.ranks,
        nodes=options.nodes,
        groups=groups,
        bytes_per_expert=size.num_bytes,
        bandwidth=1e9 * bandwidth,
        node_bandwidth=1e9 * node_bandwidth,
        step_seconds=step.seconds * load.engine_steps,
        expert_cost=cost.tokens,
        token_seconds=cost.token_seconds,
        message_seconds=0.0 if settings.rebalancer.batch == "replicated" else options.message_us / 1e6,
    )
    with progress_bar(errors) as bar:
        task = bar.add_task("trying settings", total=None)
        advice = sweep(
            load,
            machine,
            settings.planner,
            settings.rebalancer,
            redundant=redundant or (),
            intervals=[max(1, round(steps / load.engine_steps)) for steps in intervals or ()],
            prices=[
                PlannerOptions.model_validate({"move_price": price}).move_price for price in prices or ()
            ],
            cache=TrialCache(cache_folder() / "advise"),
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    console = Console()
    console.print(_table(load, machine, advice, step.seconds))
    seconds = step.seconds * load.engine_steps * load.num_steps if step.is_measured else 0.0
    said = verdict(advice, load.num_experts)
    said += when_not(advice, machine, load.num_experts, seconds)
    said += [*size.said, *step.said, cost.said]
    if recording is not None:
        said += [f"{sentence}." for sentence in recording.left_out]
        if recording.newest.topology.rank_slots is not None:
            said.append(
                "The recorded ranks differ in slots; every setting tried here gives all ranks as many."
            )
    recorded = busy_layers(load)
    if preset is not None and recorded < preset.layers:
        said.append(f"{recorded} of {preset.layers} MoE layers are recorded: costs are of these.")
    for line in said:
        console.print(line, highlight=False)
    engine = "" if recording is None else recording.newest.engine
    enable = how_to_enable(advice, machine, engine, load.num_experts)
    console.print("Enable it with:" if is_worth_it(advice) else "To try it all the same:", highlight=False)
    console.print(f"  {enable}", highlight=False, soft_wrap=True)
    if as_json:
        content = {
            "worth_it": is_worth_it(advice),
            "safe": advice.back_test.safe,
            "said": said,
            "enable": enable,
            "static": advice.static,
            "best": _plain(advice.best),
            "back_test": asdict(advice.back_test),
            "expert_cost": cost.tokens,
            "dispatch": None if advice.dispatch is None else _plain_gain(advice.dispatch),
            "planned": advice.planned,
            "tried": [_plain(item) for item in advice.rated],
            "cached": advice.cached,
        }
        print(json.dumps(content))


def _plain(item: Rated) -> dict[str, object]:
    gains = {"speedup": item.speedup, "net": item.net, "dispatched": item.dispatched}
    return {**asdict(item.setting), **item.trial.model_dump(), **asdict(item.cost), **gains}


def _plain_gain(gain: DispatchGain) -> dict[str, object]:
    pays = None if gain.break_even_seconds == float("inf") else gain.break_even_seconds
    return {**asdict(gain), "break_even_seconds": pays, "worth_it": gain.is_worth_it}


def _table(load: LoadTrace, machine: Machine, advice: Advice, step_seconds: float) -> Table:
    table = Table(
        title=f"{load.name}: {size_of(load)} of {machine.bytes_per_expert / 1e6:.1f} MB on "
        f"{counted(machine.ranks, 'rank')}",
        caption=f"balancedness: on the steps after each plan; without balancing {advice.static:.3f}. "
        "speed-up: of the MoE layers, over no balancing, transfers counted as lost. with dispatch: balanced, "
        f"its message {'left out' if advice.message_left_out else 'included'}. links: share of time with "
        "transfers on the busiest "
        f"rank's links, at {1000 * step_seconds:.3g} ms a step. memory: redundant experts, per rank."
        + (f" {advice.cached} trials came from the cache." if advice.cached else ""),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    # Together they fit into 80 columns.
    names = (
        "redun-\ndant",
        "inter-\nval",
        "price",
        "balanced-\nness",
        "speed-\nup",
        "with\ndispatch",
        "GB/hour",
        "links",
        "memory\nGB",
    )
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for item in advice.rated:
        table.add_row(
            str(item.setting.slots - load.num_experts),
            str(advice.engine_interval(item.setting)),
            f"{item.setting.move_price:g}",
            f"{item.trial.balancedness:.4f}",
            f"{item.net:.2f}",
            "-" if item.dispatched is None else f"{item.dispatched:.2f}",
            f"{item.cost.bytes_per_hour / 1e9:.0f}",
            f"{item.cost.transfer_share:.2%}",
            f"{item.cost.replica_bytes / 1e9:.1f}",
            style="bold green" if item is advice.best else None,
        )
    return table
