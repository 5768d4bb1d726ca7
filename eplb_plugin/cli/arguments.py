"""The options that several commands take: their help, and the setting that each one stands for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated

import typer

from ..settings import Settings, load_settings
from ..simulation import POLICIES
from ..traffic import PROFILES

__all__ = [
    "AsJson",
    "Batch",
    "Config",
    "Drift",
    "Groups",
    "Interval",
    "Load",
    "MaxTokens",
    "Mode",
    "Nodes",
    "Policies",
    "Ranks",
    "Seed",
    "Slots",
    "Steps",
    "settings_for",
]

Load = Annotated[
    str,
    typer.Argument(
        help=f"A recorded load of any format, a token trace, or generated traffic: {', '.join(PROFILES)}."
    ),
]
Ranks = Annotated[int | None, typer.Option(help="Ranks (GPUs) of the expert-parallel group.")]
Slots = Annotated[int | None, typer.Option(help="Physical experts over all ranks.")]
Nodes = Annotated[int | None, typer.Option(help="Nodes that the ranks are spread over.")]
Groups = Annotated[int | None, typer.Option(help="Groups of experts per layer.")]
Interval = Annotated[int | None, typer.Option(help="Steps between two rebalances.")]
Policies = Annotated[
    list[str] | None, typer.Option("--policy", help=f"Repeat to compare several of: {', '.join(POLICIES)}.")
]
Mode = Annotated[str | None, typer.Option(help="Token traces: decode or prefill.")]
Batch = Annotated[int | None, typer.Option(help="Decode: requests in flight.")]
MaxTokens = Annotated[int | None, typer.Option(help="Prefill: most tokens of one step.")]
Steps = Annotated[int | None, typer.Option(help="Decode and generated traffic: steps.")]
Drift = Annotated[float | None, typer.Option(help="How strongly the mix of topics changes.")]
Seed = Annotated[int | None, typer.Option(help="Seed of the replay or of the traffic.")]
Config = Annotated[Path | None, typer.Option(help="YAML file with options.")]
AsJson = Annotated[bool, typer.Option("--json", help="End with one line of JSON.")]

_SETTINGS: Mapping[str, str] = MappingProxyType(
    {"interval": "rebalancer.interval"}
    | {
        name: f"simulate.{name}"
        for name in (
            "ranks",
            "slots",
            "nodes",
            "groups",
            "policies",
            "mode",
            "batch",
            "max_tokens",
            "steps",
            "drift",
            "seed",
        )
    }
)


def settings_for(context: typer.Context) -> Settings:
    """The settings of the file and the environment, under what was given on the command line.

    Args:
        context: of a command, whose parameters are options of that name or its own affair.

    Raises:
        ConfigError: an unknown option or a wrong value.
    """
    given = {_SETTINGS[name]: value for name, value in context.params.items() if name in _SETTINGS}
    # An option that may be repeated, and was not given at all, is an empty list.
    return load_settings(
        context.params["config"],
        {name: None if value in ([], ()) else value for name, value in given.items()},
    )
