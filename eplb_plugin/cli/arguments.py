"""The options that several commands take: their help, and the setting that each one stands for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import typer

from ..config.sources import Settings, load_settings
from ..core.errors import ConfigError
from ..offline.simulation import POLICIES
from ..offline.synthetic_traffic import PROFILES

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
    "MovePrice",
    "Nodes",
    "Policies",
    "RankSlots",
    "Ranks",
    "SETTINGS",
    "Seed",
    "Slots",
    "Steps",
    "check_value",
    "option",
    "settings_for",
]

Load = Annotated[
    str,
    typer.Argument(
        help=f"A recorded load of any format, a token trace, or generated traffic: {', '.join(PROFILES)}."
    ),
]


def option(place: str, meaning: str, *names: str) -> Any:
    """A command's option for the setting `place` (`section.option`), whose default its help shows."""
    section, _, setting = place.partition(".")
    default = getattr(Settings.model_fields[section].default, setting)
    shown = ", ".join(default) if isinstance(default, tuple) else str(default)
    return typer.Option(*names, help=meaning, show_default=False if default is None else shown)


Ranks = Annotated[int | None, option("simulate.ranks", "Ranks (GPUs) of the expert-parallel group.")]
Slots = Annotated[
    int | None, option("simulate.slots", "Physical experts over all ranks; unset: one spare slot per rank.")
]
RankSlots = Annotated[
    list[int] | None,
    option(
        "simulate.rank_slots", "Slots of one rank, in place of --ranks and --slots; repeat for each rank."
    ),
]
Nodes = Annotated[int | None, option("simulate.nodes", "Nodes that the ranks are spread over.")]
Groups = Annotated[int | None, option("simulate.groups", "Groups of experts per layer.")]
Interval = Annotated[
    int | None, option("rebalancer.interval", "Steps between two rebalances; fewer for a short load.")
]
MovePrice = Annotated[
    float | None,
    option("planner.move_price", "What each move has to gain, as a share of a slot's mean load; 0: nothing."),
]
Policies = Annotated[
    list[str] | None,
    option("simulate.policies", f"Repeat to compare several of: {', '.join(POLICIES)}.", "--policy"),
]
Mode = Annotated[str | None, option("simulate.mode", "Token traces: decode or prefill.")]
Batch = Annotated[int | None, option("simulate.batch", "Decode: requests in flight.")]
MaxTokens = Annotated[int | None, option("simulate.max_tokens", "Prefill: most tokens of one step.")]
Steps = Annotated[
    int | None, option("simulate.steps", "Decode and generated traffic: steps; unset: eight intervals.")
]
Drift = Annotated[
    float | None,
    option("simulate.drift", "Decode and generated traffic: how strongly the mix of topics changes."),
]
Seed = Annotated[int | None, option("simulate.seed", "Decode and generated traffic: seed of all draws.")]
Config = Annotated[Path | None, typer.Option(help="YAML file with options.")]
AsJson = Annotated[bool, typer.Option("--json", help="End with one line of JSON.")]

SETTINGS: Mapping[str, str] = MappingProxyType(
    {"interval": "rebalancer.interval", "move_price": "planner.move_price"}
    | {
        name: f"simulate.{name}"
        for name in (
            "ranks",
            "slots",
            "rank_slots",
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
"""The setting that each option of these names stands for, in every command but the demo."""


def settings_for(context: typer.Context, places: Mapping[str, str] = SETTINGS) -> Settings:
    """The settings of the file and the environment, under what was given on the command line.

    Args:
        context: of a command, whose parameters are options of the names in `places`, or its own affair.
        places: the setting that each option stands for.

    Raises:
        ConfigError: an unknown option or a wrong value.
    """
    flags = {parameter.name: parameter.opts[0] for parameter in context.command.params}
    given = {name: value for name, value in context.params.items() if name in places}
    # An option that may be repeated, and was not given at all, is an empty list.
    given = {name: value for name, value in given.items() if value not in (None, [], ())}
    for name, value in given.items():
        check_value(flags[name], places[name], value)
    return load_settings(context.params["config"], {places[name]: value for name, value in given.items()})


def check_value(flag: str, place: str, value: object) -> None:
    """Check what was typed for an option against the setting that it stands for.

    Raises:
        ConfigError: it is outside the range of the setting; names the option as typed.
    """
    section, _, setting = place.partition(".")
    model = type(Settings.model_fields[section].default)
    try:
        model(**{setting: value})
    except ConfigError as error:
        raise ConfigError(f"{flag}: {str(error).removeprefix(f'{model.__name__}: {setting}: ')}") from None
