"""The value of `--eplb-algorithm`: the names of this package's planner, and the options after the name."""

from __future__ import annotations

from ...config.options import PlannerOptions
from ...core.errors import ConfigError
from ..common.options import SHARED, EngineOptions, options_in_settings

__all__ = ["ALGORITHM", "ALGORITHMS", "OPTIONS", "is_ours", "parse_algorithm"]

ALGORITHM = "eplb_plugin"
"""The name of this package's planner among SGLang's algorithms."""

ALGORITHMS = (ALGORITHM, "ensemble")
"""All names of it: `ensemble` is the former name, for the same planner with the same options."""

# A nested section does not fit after the colon: the packer of `ensemble` is configured by the file.
_SETTINGS = {name: f"planner.{name}" for name in PlannerOptions.model_fields if name != "ensemble"}
_SETTINGS |= SHARED
_LONGEST = 200

OPTIONS = ("config", "check_agreement", *_SETTINGS)
"""Options after the name."""


def is_ours(algorithm: str) -> bool:
    """Whether the value of `--eplb-algorithm` names this package, well-formed or not."""
    return algorithm.partition(":")[0].strip() in ALGORITHMS


def parse_algorithm(algorithm: str) -> EngineOptions:
    """The options in `eplb_plugin`, or in `eplb_plugin:OPTION=VALUE,OPTION=VALUE` with names from `OPTIONS`.

    They go over the environment, which goes over the file in `config` or EPLB_PLUGIN_CONFIG. Of the file
    count the section `planner`, `snapshots` and `history` of `rebalancer`, and `enabled` of `metrics`.

    Raises:
        ConfigError: a malformed, unknown or repeated option, a wrong value, or an unusable file.
    """
    source = f"--eplb-algorithm {_shortened(algorithm)}"
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
    if not is_ours(algorithm):
        raise ConfigError(f"{source}: {_shortened(name)!r} is not {ALGORITHM!r}")
    if colon and not text.strip():
        raise ConfigError(f"{source}: no option follows the colon")
    given: dict[str, str] = {}
    for item in text.split(",") if colon else ():
        option, equals, value = (part.strip() for part in item.partition("="))
        if not option or not equals or not value:
            raise ConfigError(f"{source}: {_shortened(item)!r} is not OPTION=VALUE")
        if option not in OPTIONS:
            raise ConfigError(
                f"{source}: unknown option {_shortened(option)!r}; there are {', '.join(OPTIONS)}"
            )
        if option in given:
            raise ConfigError(f"{source}: {option} is given twice")
        given[option] = value
    return given


def _shortened(text: str) -> str:
    """The text on one line of at most 200 characters, for a message."""
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST else line[:_LONGEST] + "..."
