"""`eplb-plugin convert`: recorded loads from one format to another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..formats.loads import LOAD_FORMATS, format_for_output, write_load
from ..offline.traces import LoadTrace
from . import arguments
from .console import counted
from .loading import load_for

__all__ = ["convert", "with_first_layer"]


def convert(
    context: typer.Context,
    source: Annotated[
        str, typer.Argument(help="A recorded load of any format, a token trace, or a traffic profile.")
    ],
    output: Annotated[Path, typer.Argument(help="The file to write; its suffix says which format.")],
    to: Annotated[
        str | None, typer.Option(help=f"Format, where the suffix does not say: {', '.join(LOAD_FORMATS)}.")
    ] = None,
    first_layer: Annotated[
        int | None, typer.Option(help="Layer of the model that the first row is of (DeepSeek-V3: 3).")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Experts per token, for tensorrt-llm.")] = None,
    mode: arguments.Mode = None,
    batch: arguments.Batch = None,
    max_tokens: arguments.MaxTokens = None,
    steps: arguments.Steps = None,
    seed: arguments.Seed = None,
    config: arguments.Config = None,
) -> None:
    """Convert a recorded load; `docs/formats.md` describes the formats. Token traces become loads."""
    form = format_for_output(output, to)
    settings = arguments.settings_for(context)
    with Console(stderr=True).status("reading the load"):
        load = with_first_layer(load_for(source, settings), first_layer)
    write_load(output, load, form, top_k)
    Console().print(
        f"{output}: {counted(load.num_steps, 'step')}, {counted(load.num_layers, 'layer')}, "
        f"{counted(load.num_experts, 'expert')} ({form.name})",
        highlight=False,
        soft_wrap=True,
    )


def with_first_layer(load: LoadTrace, first_layer: int | None) -> LoadTrace:
    """The load with its rows numbered from `first_layer`; None leaves them as they are."""
    if first_layer is None:
        return load
    return LoadTrace(load.load, load.name, tuple(range(first_layer, first_layer + load.num_layers)))
