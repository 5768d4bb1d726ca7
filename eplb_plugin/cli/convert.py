"""`eplb-plugin convert`: recorded loads from one format to another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..formats.loads import LOAD_FORMATS, format_for_output, write_load
from ..offline.traces import LoadTrace
from . import arguments
from .console import size_of, tell_left_out
from .loading import load_for, recording_for

__all__ = ["convert", "with_first_layer"]


def convert(
    context: typer.Context,
    source: Annotated[
        str, typer.Argument(help="Recorded load of any format, token trace, or traffic profile.")
    ],
    output: Annotated[Path, typer.Argument(help="File to write; its suffix names the format.")],
    to: Annotated[
        str | None, typer.Option(help=f"Format for another suffix: {', '.join(LOAD_FORMATS)}.")
    ] = None,
    first_layer: Annotated[
        int | None, typer.Option(help="Layer of the model in the first row (DeepSeek-V3: 3).")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Experts per token; for tensorrt-llm only.")] = None,
    mode: arguments.Mode = None,
    batch: arguments.Batch = None,
    max_tokens: arguments.MaxTokens = None,
    steps: arguments.Steps = None,
    seed: arguments.Seed = None,
    config: arguments.Config = None,
) -> None:
    """Convert a recorded load to another format (see `docs/formats.md`). Token traces become loads."""
    form = format_for_output(output, to)
    settings = arguments.settings_for(context)
    errors = Console(stderr=True)
    with errors.status("reading the load"):
        recording, settings = recording_for(source, settings)
        load = with_first_layer(load_for(source, settings, recording=recording), first_layer)
    tell_left_out(errors, source, recording)
    write_load(output, load, form, top_k)
    Console().print(f"{output}: {size_of(load)} ({form.name})", highlight=False, soft_wrap=True)


def with_first_layer(load: LoadTrace, first_layer: int | None) -> LoadTrace:
    """The load with rows numbered from `first_layer`; None keeps their numbers."""
    if first_layer is None:
        return load
    return replace(load, layer_ids=tuple(range(first_layer, first_layer + load.num_layers)))
