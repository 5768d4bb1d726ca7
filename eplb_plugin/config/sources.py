"""Where options come from: the configuration file, then the environment, then the command line, each over the
last."""

from __future__ import annotations

import os
import reprlib
import textwrap
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import yaml
from pydantic import PrivateAttr
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from ..core.errors import ConfigError, TraceError
from ..core.safe_files import read_yaml
from .options import (
    DemoOptions,
    MetricsOptions,
    Options,
    PlannerOptions,
    RebalancerOptions,
    SimulateOptions,
)

__all__ = [
    "COMMAND_LINE",
    "CONFIG_VARIABLE",
    "Settings",
    "default_yaml",
    "load_settings",
    "read_section",
]

ENV_PREFIX = "EPLB_PLUGIN_"
ENV_DELIMITER = "__"
CONFIG_VARIABLE = "EPLB_PLUGIN_CONFIG"
"""The environment variable that names the configuration file."""

COMMAND_LINE = "command line"
"""The command line, among the origins of options."""

ADAPTER_SECTIONS = ("eplb_plugin",)
"""Sections of the file that belong to an engine's adapter, which reads and checks them itself."""

_MAX_BYTES = 2**20
_MAX_VALUES = 10_000

Sections: TypeAlias = dict[str, dict[str, Any]]


class Settings(BaseSettings):
    """The options of every part. Making one reads nothing: `load_settings` does."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_nested_delimiter=ENV_DELIMITER,
        env_parse_none_str="null",
        extra="forbid",
        frozen=True,
    )

    planner: PlannerOptions = PlannerOptions()
    rebalancer: RebalancerOptions = RebalancerOptions()
    metrics: MetricsOptions = MetricsOptions()
    simulate: SimulateOptions = SimulateOptions()
    demo: DemoOptions = DemoOptions()

    _origins: Mapping[str, str] = PrivateAttr(default_factory=dict)

    @property
    def origins(self) -> Mapping[str, str]:
        """Where each value that is not a default comes from, by `section.option`."""
        return MappingProxyType(dict(self._origins))

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)


def load_settings(path: str | Path | None = None, overrides: Mapping[str, Any] | None = None) -> Settings:
    """The settings in force: defaults, then the file, then the environment, then `overrides`.

    Args:
        path: YAML file of sections with options; None takes the one that EPLB_PLUGIN_CONFIG names, if any.
        overrides: option to value by `section.option`, as given on the command line; None values count as
            not given.

    Raises:
        ConfigError: an unknown section or option, or a wrong value; names it and where it comes from.
    """
    path = path or os.environ.get(CONFIG_VARIABLE) or None
    merged: Sections = {}
    origins: dict[str, str] = {}
    if path is not None:
        sections = {
            key: value for key, value in _read_yaml(Path(path)).items() if key not in ADAPTER_SECTIONS
        }
        _overlay(merged, origins, sections, str(path))
    for variable, sections in _read_environment():
        _overlay(merged, origins, sections, f"environment variable {variable}")
    for key, value in (overrides or {}).items():
        if value is not None:
            section, _, option = key.partition(".")
            _overlay(merged, origins, {section: {option: value}}, COMMAND_LINE)
    settings = Settings(**merged)  # type: ignore[arg-type]  # sections are validated into their models
    settings._origins = origins
    return settings


def read_section(section: str) -> dict[str, Any] | None:
    """One section of the file that EPLB_PLUGIN_CONFIG names, unchecked, for adapters with options of their
    own; None where there is no such file or section.

    Raises:
        ConfigError: the file cannot be read, or is not YAML with sections.
    """
    path = os.environ.get(CONFIG_VARIABLE)
    return _read_yaml(Path(path)).get(section) if path else None


def default_yaml() -> str:
    """A configuration file with every option, its default and what it means: `configs/default.yaml`."""
    lines = [
        "# Every option with its default. Copy what you want to change; unknown keys are refused.",
        "# Environment variables go over the file (EPLB_PLUGIN_PLANNER__SEED=1), the command line over both.",
        f"# Use it with --config FILE, or name it in {CONFIG_VARIABLE}.",
    ]
    for section, field in Settings.model_fields.items():
        model: type[Options] = type(field.default)
        lines += ["", f"# {(model.__doc__ or '').strip()}", f"{section}:"]
        for option, value in field.default.model_dump(mode="json").items():
            meaning = " ".join((model.model_fields[option].description or "").split())
            lines += textwrap.wrap(meaning, 100, initial_indent="  # ", subsequent_indent="  # ")
            # A lone scalar is dumped with an end-of-document mark on a line of its own.
            lines.append(f"  {option}: {yaml.safe_dump(value, default_flow_style=True).splitlines()[0]}")
    return "\n".join(lines) + "\n"


def _overlay(merged: Sections, origins: dict[str, str], sections: Sections, origin: str) -> None:
    """Put the options of one origin over those below it, and check at once, so that errors can name it."""
    for section, options in sections.items():
        field = Settings.model_fields.get(section)
        if field is None:
            known = ", ".join(Settings.model_fields)
            raise ConfigError(f"{origin}: unknown section {reprlib.repr(section)}; there are {known}")
        model: type[Options] = type(field.default)
        for option in options:
            if option not in model.model_fields:
                known = ", ".join(model.model_fields)
                raise ConfigError(f"{origin}: unknown option {section}.{option[:80]}; {section} has {known}")
        target = merged.setdefault(section, {})
        target.update(options)
        origins.update({f"{section}.{option}": origin for option in options})
        try:
            model(**target)
        except ConfigError as error:
            raise ConfigError(f"{origin}: section {section}: {error}") from None


def _read_yaml(path: Path) -> Sections:
    try:
        content = read_yaml(path, _MAX_BYTES, _MAX_VALUES)
    except TraceError as error:
        raise ConfigError(str(error)) from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: holds a {type(content).__name__}, not sections with options")
    for section, options in content.items():
        if not isinstance(section, str) or not isinstance(options, dict):
            raise ConfigError(
                f"{path}: section {reprlib.repr(section)} holds {reprlib.repr(options)}, "
                "not options with values"
            )
        for option in options:
            if not isinstance(option, str):
                raise ConfigError(
                    f"{path}: section {section[:80]} has the option {reprlib.repr(option)}, not a name"
                )
    return content


def _read_environment() -> list[tuple[str, Sections]]:
    """(variable, what it sets) for each variable with the prefix, in order of name."""
    names = sorted(name for name in os.environ if name.upper().startswith(ENV_PREFIX))
    names = [name for name in names if name.upper() != CONFIG_VARIABLE]
    for name in names:
        parts = name[len(ENV_PREFIX) :].lower().split(ENV_DELIMITER)
        if len(parts) != 2 or not all(parts):
            raise ConfigError(
                f"environment variable {name}: unknown; options are set as {ENV_PREFIX}SECTION{ENV_DELIMITER}"
                f"OPTION, the file by {CONFIG_VARIABLE}"
            )
    try:
        # It reads numbers as text (the models convert them) and lists as JSON.
        values: Sections = EnvSettingsSource(Settings)() if names else {}
    except SettingsError as error:
        raise ConfigError(
            f"environment variables {', '.join(names)}: {error}: {error.__cause__} (write lists as JSON)"
        ) from None
    result = []
    for name in names:
        section, option = name[len(ENV_PREFIX) :].lower().split(ENV_DELIMITER)
        value = values.get(section, {}).get(option, os.environ[name])
        result.append((name, {section: {option: value}}))
    return result
