"""`eplb-plugin report`: recorded loads before and after balancing, as HTML with pictures; or a map."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..core.errors import ConfigError, TraceError
from ..core.safe_files import check_output
from ..formats.loads import recognise
from ..formats.recordings import is_recording
from ..offline.simulation import policy_setup
from ..planning.planner import warmup
from ..report.figures import picture
from ..report.page import picture_set, write_page
from ..report.replay import replay
from . import arguments
from .console import compiling, progress_bar, tell_left_out
from .loading import fit_interval, load_for, planner_for, recording_for, topology_for
from .report_map import report_map

__all__ = ["report"]

_INTERVAL = 128
_PAGE = "report.html"


def report(
    context: typer.Context,
    traces: Annotated[
        list[str] | None,
        typer.Argument(help="Recorded loads of any format, token traces, or traffic profiles."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="The HTML file to write; by default report.html in the folder of a recording.",
        ),
    ] = None,
    map_file: Annotated[
        Path | None,
        typer.Option(
            "--map",
            help="A placement of any format, in place of an HTML file: a table of the slots that repeat an "
            "expert on their rank, of experts with all replicas on one rank or node, and with a load its "
            "balancedness.",
        ),
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Folder for the pictures as PNG files.")] = None,
    ranks: arguments.Ranks = None,
    slots: arguments.Slots = None,
    nodes: arguments.Nodes = None,
    groups: arguments.Groups = None,
    expert_mb: arguments.ExpertMb = None,
    interval: Annotated[
        int | None, typer.Option(help=f"Steps between two rebalances: {_INTERVAL}, fewer for a short load.")
    ] = None,
    policies: arguments.Policies = None,
    expert_cost: arguments.ExpertCost = None,
    tokens: arguments.Tokens = None,
    message_us: arguments.MessageUs = None,
    mode: arguments.Mode = None,
    batch: arguments.Batch = None,
    max_tokens: arguments.MaxTokens = None,
    steps: arguments.Steps = None,
    config: arguments.Config = None,
    as_json: Annotated[bool, typer.Option("--json", help="With --map: end with one line of JSON.")] = False,
) -> None:
    """Write an HTML file with pictures of recorded loads before and after balancing, or judge a map alone."""
    settings = arguments.settings_for(context)
    if map_file is not None:
        report_map(context, map_file, traces or [], settings, as_json)
        return
    if output is None and traces and len(traces) == 1 and os.path.isdir(traces[0]):
        if is_recording(traces[0]):
            output = Path(traces[0]) / _PAGE
        else:
            recognise(Path(traces[0]))  # an error if the folder has no load at all
    if not traces or output is None:
        raise ConfigError("report needs a load and --output FILE, or --map FILE")
    if as_json:
        raise ConfigError("--json is for --map; a report of loads is an HTML file")
    if "rebalancer.interval" not in settings.origins:
        settings = settings.replaced("rebalancer.interval", _INTERVAL)
    for name in settings.simulate.policies:
        policy_setup(name, settings.planner)
    check_output(output)
    if png is not None and png.exists() and not png.is_dir():
        raise TraceError(f"{png}: exists and is not a folder")
    with picture(1):
        pass  # an early error if matplotlib is missing
    errors = Console(stderr=True)
    sections = []
    with progress_bar(errors) as bar:
        for source in traces:
            task = bar.add_task(f"{source}: reading", total=None)
            recording, of_source = recording_for(source, settings)
            load = load_for(source, of_source, alone=len(traces) == 1, recording=recording)
            tell_left_out(errors, source, recording)
            fitting = fit_interval(of_source, load)
            topology = topology_for(load, fitting.simulate)
            bar.update(task, description=f"{source}: loading the planner")
            # On a terminal, the bar shows that work is going on.
            with nullcontext() if errors.is_terminal else compiling(errors, ""):
                warmup(dispatch=settings.planner.dispatch)
            done = replay(
                load,
                topology,
                fitting.simulate.policies,
                planner_for(load, topology, fitting),
                fitting.rebalancer,
                expert_cost=fitting.simulate.expert_cost,
                message_us=0.0 if fitting.rebalancer.batch == "replicated" else fitting.simulate.message_us,
                progress=lambda name, step, total, task=task, source=source: bar.update(  # type: ignore[misc]
                    task, description=f"{source}: {name}", completed=step, total=total
                ),
            )
            if recording is not None:
                done = replace(done, left_out=recording.left_out)
            bar.update(task, description=f"{source}: drawing", total=None)
            sections.append((done, list(picture_set(done))))
            bar.remove_task(task)
    write_page(output, sections)
    console = Console()
    console.print(f"{output}: written", highlight=False, soft_wrap=True)
    if png is not None:
        for index, (_, drawn) in enumerate(sections):
            for item in drawn:
                path = png / f"{f'{index + 1}_' if len(sections) > 1 else ''}{item.key}.png"
                try:
                    png.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(item.png)
                except OSError as error:
                    raise TraceError(f"{path}: cannot be written: {error.strerror or error}") from None
                console.print(f"{path}: written", highlight=False, soft_wrap=True)
