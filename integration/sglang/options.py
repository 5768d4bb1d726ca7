"""The value of `--eplb-algorithm`: which names are ours, and the options that follow the name."""

from __future__ import annotations

from ...config.options import PlannerOptions
from ...core.errors import ConfigError
from ..common.options import SHARED, EngineOptions, options_in_settings

__all__ = ["ALGORITHM", "OPTIONS", "is_ours", "parse_algorithm"]

ALGORITHM = "ensemble"
"""The name of this package's planner among SGLang's algorithms."""

# A nested section does not fit after the colon: the packer of `ensemble` is configured by the file.
_SETTINGS = {name: f"planner.{name}" for name in PlannerOptions.model_fields if name != "ensemble"}
_SETTINGS |= SHARED
_LONGEST = 200

OPTIONS = ("config", "check_agreement", *_SETTINGS)
"""What may follow the name."""


def is_ours(algorithm: str) -> bool:
    """Whether the value of `--eplb-algorithm` names this package, well-formed or not."""
    return algorithm.partition(":")[0].strip() == ALGORITHM


def parse_algorithm(algorithm: str) -> EngineOptions:
    """The options in `ensemble`, or in `ensemble:OPTION=VALUE,OPTION=VALUE` with names out of `OPTIONS`.

    They go over those of the environment, and these over the file that `config` or EPLB_PLUGIN_CONFIG names,
    as for the package's commands. Of the file, the section `planner` is used, `snapshots` and `history` of
    `rebalancer`, and `enabled` of `metrics`.

    Raises:
        ConfigError: a malformed, unknown or repeated option, a wrong value, or a file that cannot be used.
    """
    source = f"--eplb-algorithm {_told(algorithm)}"
    given = _split(source, algorithm)
    path = given.pop("config", None)
    agreement = {name: given.pop(name) for name in ("check_agreement",) if name in given}
    try:
        overrides = {_SETTINGS[name]: value for name, value in given.items()}
        return EngineOptions(**options_in_settings(path, overrides), **agreement)
    except ConfigError as error:
        # The name of the file may have line breaks in it.
        raise ConfigError(f"{source}: {' '.join(str(error).split())}") from None


def _split(source: str, algorithm: str) -> dict[str, str]:
    """The text of each option given, by name."""
    name, colon, text = algorithm.partition(":")
    if name.strip() != ALGORITHM:
        raise ConfigError(f"{source}: {_told(name)!r} is not {ALGORITHM!r}")
    if colon and not text.strip():
        raise ConfigError(f"{source}: no option follows the colon")
    given: dict[str, str] = {}
    for item in text.split(",") if colon else ():
        option, equals, value = (part.strip() for part in item.partition("="))
        if not option or not equals or not value:
            raise ConfigError(f"{source}: {_told(item)!r} is not OPTION=VALUE")
        if option not in OPTIONS:
            raise ConfigError(f"{source}: unknown option {_told(option)!r}; there are {', '.join(OPTIONS)}")
        if option in given:
            raise ConfigError(f"{source}: {option} is given twice")
        given[option] = value
    return given


def _told(text: str) -> str:
    """The text on one line, of a length that a message can have."""
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST else line[:_LONGEST] + "..."
