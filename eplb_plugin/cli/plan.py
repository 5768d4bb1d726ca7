"""`eplb-plugin plan`: a placement from a recorded load, written for the engine that shall use it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from ..core.balancedness import balancedness, peak_rank_loads
from ..core.load import fold_steps
from ..core.placement import Placement
from ..core.safe_files import check_output
from ..core.topology import Topology
from ..formats.placements import PLACEMENT_FORMATS, read_placement, write_placement
from ..offline.traces import LoadTrace
from ..planning.planner import Plan, warmup
from ..planning.planner import plan as plan_placement
from ..planning.policies import policy_for
from . import arguments
from .console import compiling, size_in, tell_left_out
from .convert import with_first_layer
from .loading import load_for, recording_for, topology_for

__all__ = ["plan"]


def plan(
    context: typer.Context,
    load: arguments.Load,
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write the placement to.")],
    ranks: arguments.Ranks = None,
    slots: arguments.Slots = None,
    rank_slots: arguments.RankSlots = None,
    nodes: arguments.Nodes = None,
    groups: arguments.Groups = None,
    current: Annotated[
        Path | None, typer.Option(help="Placement in force, of any format, to plan from with few moves.")
    ] = None,
    form: Annotated[
        str, typer.Option("--format", help=f"Format to write: {', '.join(PLACEMENT_FORMATS)}.")
    ] = "json",
    first_layer: Annotated[
        int | None, typer.Option(help="Model layer of the first row of the load (DeepSeek-V3: 3).")
    ] = None,
    mode: arguments.Mode = None,
    batch: arguments.Batch = None,
    max_tokens: arguments.MaxTokens = None,
    steps: arguments.Steps = None,
    drift: arguments.Drift = None,
    seed: arguments.Seed = None,
    forecast: Annotated[
        bool,
        typer.Option(
            "--forecast",
            help="Plan for the load to expect next, by planner.snapshot_decay and planner.persistence. "
            "Without it neither has any effect, and all of the recording counts equally.",
        ),
    ] = False,
    config: arguments.Config = None,
) -> None:
    """Plan a placement offline and write it for SGLang, TensorRT-LLM or another program."""
    settings = arguments.settings_for(context)
    policy_for(settings.planner)
    check_output(output)
    errors = Console(stderr=True)
    with errors.status("reading the load"):
        recording, settings = recording_for(load, settings)
        trace = with_first_layer(load_for(load, settings, recording=recording), first_layer)
    tell_left_out(errors, load, recording)
    topology = topology_for(trace, settings.simulate)
    in_force = None if current is None else read_placement(current, trace.num_experts, trace.layer_ids)
    window = fold_steps(trace.load, settings.rebalancer.snapshots * settings.rebalancer.history)
    equally = {"snapshot_decay": 1.0, "persistence": 0.0}
    options = settings.planner if forecast else settings.planner.model_copy(update=equally)
    with compiling(errors, "planning"):
        warmup()
        made = plan_placement(window, topology, in_force, options)
    write_placement(output, made.placement, trace.layer_ids, topology, form)
    console = Console()
    console.print(_table(trace, window, topology, made, in_force))
    console.print(f"{output}: written ({form})", highlight=False, soft_wrap=True)


def _table(
    trace: LoadTrace, window: torch.Tensor, topology: Topology, made: Plan, in_force: Placement | None
) -> Table:
    before = in_force or Placement.default(trace.num_layers, trace.num_experts, topology.num_slots)
    # Of single steps: ranks wait for peaks that a sum of steps hides.
    steps = trace.single_steps
    peak = float(peak_rank_loads(window, made.placement, topology).mean(0).sum())
    bound = float(made.lower_bound.sum())
    title = f"{trace.name}: {size_in(trace, topology)}"
    table = Table(title=title, box=box.SIMPLE_HEAD, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    start = "the placement in force" if in_force else "the engine's default placement"
    table.add_row(f"balancedness of {start}", f"{balancedness(steps, before, topology):.4f}")
    table.add_row("balancedness of the plan", f"{balancedness(steps, made.placement, topology):.4f}")
    table.add_row("peak rank load above the lower bound", f"{peak / bound - 1 if bound else 0:.2%}")
    share = made.moves / (trace.num_layers * topology.num_slots)
    moves = f"{made.moves} ({share:.1%} of the slots)" if in_force else "none: a new start"
    table.add_row("experts to move", moves)
    table.add_row("planning", f"{1000 * made.seconds:.1f} ms")
    return table
