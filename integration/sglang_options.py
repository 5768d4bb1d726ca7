"""The value of `--eplb-algorithm`: which names are ours, and the options that follow the name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ..config import PlannerOptions
from ..errors import ConfigError
from .engine_planner import EngineOptions

__all__ = ["ALGORITHM", "is_ours", "parse_algorithm"]

ALGORITHM = "ensemble"
"""The name of this package's planner among SGLang's algorithms."""

_ENGINE = tuple(name for name in EngineOptions.model_fields if name != "planner")
_PLANNER = tuple(PlannerOptions.model_fields)


def is_ours(algorithm: str) -> bool:
    """Whether the value of `--eplb-algorithm` names this package, well-formed or not."""
    return algorithm.partition(":")[0].strip() == ALGORITHM


def parse_algorithm(algorithm: str) -> EngineOptions:
    """The options in `ensemble`, `ensemble:OPTION=VALUE,...` or `ensemble:config=FILE,...`.

    An option is one of `EngineOptions` or of `PlannerOptions`, by its plain name. FILE is YAML in the shape
    of `EngineOptions`; what is written beside it goes over what it says.

    Raises:
        ConfigError: a malformed, unknown or repeated option, a wrong value, or a file that cannot be used.
    """
    name, colon, text = algorithm.partition(":")
    source = f"--eplb-algorithm {algorithm}"
    if name.strip() != ALGORITHM:
        raise ConfigError(f"{source}: {name!r} is not {ALGORITHM!r}")
    if colon and not text.strip():
        raise ConfigError(f"{source}: no option follows the colon")
    given: dict[str, Any] = {}
    for item in text.split(",") if colon else ():
        option, equals, value = (part.strip() for part in item.partition("="))
        if not option or not equals or not value:
            raise ConfigError(f"{source}: {item.strip()!r} is not OPTION=VALUE")
        if option in given:
            raise ConfigError(f"{source}: {option} is given twice")
        given[option] = value
    content = _read_config(source, Path(given.pop("config"))) if "config" in given else {}
    planner = {**content.pop("planner", {})}
    for option, value in given.items():
        if option not in (*_ENGINE, *_PLANNER):
            known = ", ".join(("config", *_ENGINE, *_PLANNER))
            raise ConfigError(f"{source}: unknown option {option!r}; there are {known}")
        # As in a file: null, true and numbers are what YAML takes them for.
        target = planner if option in _PLANNER else content
        target[option] = _yaml(source, value)
    try:
        return EngineOptions(**content, planner=PlannerOptions(**planner))
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def _read_config(source: str, path: Path) -> dict[str, Any]:
    """The sections of a YAML file, its keys checked: `EngineOptions` only sees the values."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{source}: {path} cannot be read: {error}") from None
    content = _yaml(f"{source}: {path}", text)
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{source}: {path} holds a {type(content).__name__}, not options with values")
    planner = content.get("planner")
    if "planner" in content and not isinstance(planner, dict):
        raise ConfigError(f"{source}: {path}: planner holds {planner!r}, not options with values")
    for option in content:
        if option not in (*_ENGINE, "planner"):
            known = ", ".join(("planner", *_ENGINE))
            raise ConfigError(f"{source}: {path}: unknown option {option!r}; there are {known}")
    for option in planner or {}:
        if option not in _PLANNER:
            known = ", ".join(_PLANNER)
            raise ConfigError(f"{source}: {path}: unknown option planner.{option}; there are {known}")
    return content


def _yaml(source: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not YAML: {' '.join(str(error).split())}") from None
