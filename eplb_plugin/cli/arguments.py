"""Command-line options that several commands share. Help and default come from the settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..config.options import Options
from ..config.sources import COMMAND_LINE, Settings, load_settings
from ..core.errors import ConfigError
from ..offline.dispatch_replay import SPLITS
from ..offline.simulation import POLICIES
from ..offline.synthetic_traffic import PROFILES

__all__ = [
    "AsJson",
    "Batch",
    "Config",
    "Dispatches",
    "Drift",
    "ExpertCost",
    "ExpertMb",
    "Groups",
    "Interval",
    "Load",
    "MessageUs",
    "MaxTokens",
    "Mode",
    "MovePrice",
    "Nodes",
    "Policies",
    "RankSlots",
    "Ranks",
    "Seed",
    "Slots",
    "Steps",
    "Tokens",
    "check_value",
    "option",
    "setting_of",
    "settings_for",
]

# Options that are not named after a setting of the command's own section.
_OF_OTHER_SECTIONS = {
    "interval": "rebalancer.interval",
    "move_price": "planner.move_price",
    "metrics_port": "metrics.port",
    "tokens": "rebalancer.batch",
}


def option(place: str, *names: str, meaning: str | None = None) -> Any:
    """The command-line option of the setting `place` (`section.option`).

    Args:
        place: the setting with the help and the default.
        names: flags, if not the name of the parameter.
        meaning: another help text.
    """
    model, name = _model_of(place)
    field = model.model_fields[name]
    shown = ", ".join(field.default) if isinstance(field.default, tuple) else str(field.default)
    told = " ".join((meaning or field.description or "").split())
    return typer.Option(*names, help=told, show_default=False if field.default is None else shown)


def _model_of(place: str) -> tuple[type[Options], str]:
    section, _, name = place.partition(".")
    return type(Settings.model_fields[section].default), name


Load = Annotated[
    str, typer.Argument(help=f"Recorded load of any format, token trace, or profile: {', '.join(PROFILES)}.")
]
Ranks = Annotated[int | None, option("simulate.ranks")]
Slots = Annotated[int | None, option("simulate.slots")]
RankSlots = Annotated[
    list[int] | None,
    option(
        "simulate.rank_slots",
        meaning="Slots of one rank, in place of --ranks and --slots; once for each rank: "
        "--rank-slots 5 --rank-slots 5 --rank-slots 3.",
    ),
]
Nodes = Annotated[int | None, option("simulate.nodes")]
Groups = Annotated[int | None, option("simulate.groups")]
Interval = Annotated[
    int | None, option("rebalancer.interval", meaning="Steps between two rebalances; fewer for a short load.")
]
MovePrice = Annotated[
    str | None,
    option(
        "planner.move_price",
        meaning="Minimum gain of each transfer, as a share of the mean slot load; 0: free; auto: by time.",
    ),
]
ExpertMb = Annotated[float | None, option("simulate.expert_mb")]
Policies = Annotated[
    list[str] | None,
    option("simulate.policies", "--policy", meaning=f"Policy to replay; repeatable: {', '.join(POLICIES)}."),
]
Dispatches = Annotated[
    list[str] | None,
    option(
        "simulate.dispatches",
        "--dispatch",
        meaning=f"Dispatch to judge on single steps; repeatable: {', '.join(SPLITS)}.",
    ),
]
ExpertCost = Annotated[int | None, option("simulate.expert_cost")]
MessageUs = Annotated[float | None, option("simulate.message_us")]
Tokens = Annotated[str | None, option("rebalancer.batch", "--tokens")]
Mode = Annotated[str | None, option("simulate.mode")]
Batch = Annotated[int | None, option("simulate.batch")]
MaxTokens = Annotated[int | None, option("simulate.max_tokens")]
Steps = Annotated[int | None, option("simulate.steps")]
Drift = Annotated[float | None, option("simulate.drift")]
Seed = Annotated[int | None, option("simulate.seed")]
Config = Annotated[Path | None, typer.Option(help="YAML file with options.")]
AsJson = Annotated[bool, typer.Option("--json", help="End with one line of JSON.")]


def setting_of(parameter: str, section: str) -> str | None:
    """The setting (`section.option`) of a parameter of a command with options of `section`, if any."""
    model, _ = _model_of(section)
    return f"{section}.{parameter}" if parameter in model.model_fields else _OF_OTHER_SECTIONS.get(parameter)


def settings_for(context: typer.Context, section: str = "simulate") -> Settings:
    """The settings of the file, the environment and the command line.

    Args:
        context: context of a command.
        section: the section of options of the same name.

    Raises:
        ConfigError: an unknown option, a wrong value, or ranks or slots that contradict `rank_slots`.
    """
    given = {}
    for parameter in context.command.params:
        place, value = setting_of(parameter.name or "", section), context.params.get(parameter.name or "")
        # A repeatable option that is not given is an empty list.
        if place is not None and value not in (None, [], ()):
            check_value(parameter.opts[0], place, value)
            given[place] = value
    settings = load_settings(context.params["config"], given)
    if section == "simulate" and "ranks" in context.params:
        _check_rank_slots(settings)
    return settings


def _check_rank_slots(settings: Settings) -> None:
    """Raise ConfigError if ranks or slots are given beside `rank_slots`, and are others than there."""
    rank_slots = settings.simulate.rank_slots
    if rank_slots is None:
        return
    for name, right in (("ranks", len(rank_slots)), ("slots", sum(rank_slots))):
        value = getattr(settings.simulate, name)
        if f"simulate.{name}" in settings.origins and value not in (None, right):
            given, other = (_told(f"simulate.{item}", settings) for item in (name, "rank_slots"))
            raise ConfigError(
                f"{given} {value} contradicts {other}, which gives {right} {name}; leave one of them out"
            )


def _told(place: str, settings: Settings) -> str:
    """The flag of a given setting, or its name and origin."""
    origin = settings.origins[place]
    if origin == COMMAND_LINE:
        return f"--{place.rpartition('.')[2].replace('_', '-')}"
    return f"{place} ({origin})"


def check_value(flag: str, place: str, value: object) -> None:
    """Validate the value of a command-line option by the setting `place`.

    Raises:
        ConfigError: the value is out of range; names the flag.
    """
    model, name = _model_of(place)
    try:
        model(**{name: value})
    except ConfigError as error:
        raise ConfigError(f"{flag}: {str(error).removeprefix(f'{model.__name__}: {name}: ')}") from None
