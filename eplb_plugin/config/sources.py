"""Sources of options, the last one wins: defaults, configuration file, environment, command line.

Other environment variables are read here too: folders, allowed plugins, variables for workers.
"""

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
from .options import DemoOptions, MetricsOptions, Options, PlannerOptions, RebalancerOptions, SimulateOptions

__all__ = [
    "COMMAND_LINE",
    "CONFIG_VARIABLE",
    "Settings",
    "allowed_plugins",
    "cache_folder",
    "default_yaml",
    "load_settings",
    "metrics_folder",
    "pass_on",
    "read_section",
]

ENV_PREFIX = "EPLB_PLUGIN_"
ENV_DELIMITER = "__"
CONFIG_VARIABLE = "EPLB_PLUGIN_CONFIG"
"""The environment variable that names the configuration file."""

COMMAND_LINE = "command line"
"""Origin of the options of the command line."""

ADAPTER_SECTIONS = ("eplb_plugin",)
"""Sections of the file for the adapter of an engine, which validates them itself."""

_MAX_BYTES = 2**20
_MAX_VALUES = 10_000

Sections: TypeAlias = dict[str, dict[str, Any]]


class Settings(BaseSettings):
    """The options of all parts. The constructor reads neither file nor environment: `load_settings` does."""

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

    def replaced(self, place: str, value: Any) -> Settings:
        """A copy with another value of `section.option`, not validated; its origin stays."""
        section, _, option = place.partition(".")
        options = getattr(self, section).model_copy(update={option: value})
        return self.model_copy(update={section: options})

    @property
    def origins(self) -> Mapping[str, str]:
        """Origin of each option that is set, by `section.option`."""
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
        path: YAML file of sections with options; by default the file of EPLB_PLUGIN_CONFIG, if set.
        overrides: values of the command line by `section.option`; None is not given.

    Raises:
        ConfigError: an unknown section or option, or a wrong value; names it and its origin.
    """
    path = path or os.environ.get(CONFIG_VARIABLE)
    merged: Sections = {}
    origins: dict[str, str] = {}
    if path:
        sections = _read_yaml(Path(path))
        own = {name: options for name, options in sections.items() if name not in ADAPTER_SECTIONS}
        _overlay(merged, origins, own, str(path))
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
    """One section of the file of EPLB_PLUGIN_CONFIG, not validated: adapters have options of their own.

    Returns:
        None without such a file or section.

    Raises:
        ConfigError: the file is unreadable, or not YAML with sections.
    """
    path = os.environ.get(CONFIG_VARIABLE)
    return _read_yaml(Path(path)).get(section) if path else None


def default_yaml() -> str:
    """The text of `configs/default.yaml`: every option with its default and its meaning."""
    lines = [
        "# Every option with its default. Copy what you want to change; unknown keys are refused.",
        "# Variables go over the file (EPLB_PLUGIN_PLANNER__MOVE_PRICE=0.03), the command line over both.",
        f"# Use it with --config FILE, or name it in {CONFIG_VARIABLE}.",
    ]
    for section, field in Settings.model_fields.items():
        model: type[Options] = type(field.default)
        lines += ["", f"# {(model.__doc__ or '').strip()}", f"{section}:"]
        for option, value in field.default.model_dump(mode="json").items():
            meaning = " ".join((model.model_fields[option].description or "").split())
            lines += textwrap.wrap(meaning, 100, initial_indent="  # ", subsequent_indent="  # ")
            # PyYAML ends a lone scalar with an end-of-document mark on a second line.
            lines.append(f"  {option}: {yaml.safe_dump(value, default_flow_style=True).splitlines()[0]}")
    return "\n".join(lines) + "\n"


def cache_folder() -> Path:
    """Folder of reproducible results: in XDG_CACHE_HOME, by default in ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME")
    # By the XDG specification, relative paths are ignored.
    folder = Path(base) if base and Path(base).is_absolute() else Path.home() / ".cache"
    return folder / "eplb-plugin"


def metrics_folder() -> Path | None:
    """Folder of the series that the processes of an engine share with its metrics server, if any."""
    folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    return Path(folder) if folder else None


def allowed_plugins(variable: str, *, empty_is_all: bool) -> tuple[str, ...] | None:
    """The plugins in the comma-separated list of an engine's variable; None if all are allowed.

    Args:
        variable: VLLM_PLUGINS or SGLANG_PLUGINS.
        empty_is_all: whether an empty value counts as unset.
    """
    value = os.environ.get(variable)
    if value is None or (empty_is_all and not value.strip()):
        return None
    return tuple(name.strip() for name in value.split(","))


def pass_on(prefix: str, variable: str) -> None:
    """Add `prefix` to the engine's comma-separated list `variable` of prefixes, if a variable has it.

    The engine copies variables with such prefixes to its workers.
    """
    if any(name.startswith(prefix) for name in os.environ):
        known = filter(None, os.environ.get(variable, "").split(","))
        os.environ[variable] = ",".join(dict.fromkeys([*known, prefix]))


def _overlay(merged: Sections, origins: dict[str, str], sections: Sections, origin: str) -> None:
    """Overlay the options of one origin and validate at once, so that an error can name the origin."""
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
            shown = f"section {reprlib.repr(section)} holds {reprlib.repr(options)}"
            raise ConfigError(f"{path}: {shown}, not options with values")
        for option in options:
            if not isinstance(option, str):
                shown = f"section {section[:80]} has the option {reprlib.repr(option)}"
                raise ConfigError(f"{path}: {shown}, not a name")
    return content


def _read_environment() -> list[tuple[str, Sections]]:
    """(variable, its option by section) of each environment variable with the prefix, sorted by name."""
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
        # Numbers are read as text, which the models convert; lists and nested options as JSON.
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
