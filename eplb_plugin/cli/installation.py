"""Installed versions, and whether engines would load the plugin: by metadata, without importing an engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, entry_points, packages_distributions, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..config.sources import allowed_plugins
from ..core.errors import ConfigError
from ..integration.adapters import Adapter, adapters

__all__ = ["EngineState", "engine_states", "package_versions"]

_PLUGIN = "eplb_plugin"


@dataclass(frozen=True)
class EngineState:
    """One engine.

    Attributes:
        name: as people write it.
        version: of the installed package, with the package's name where that differs; None if absent.
        plugin: whether it would load the plugin, and how to enable it.
        problems: obstacles, one line for each.
        notes: remarks that are no obstacle, one line for each.
        options: options in the file for this engine alone, by `section.option`, as they were understood.
    """

    name: str
    version: str | None
    plugin: str
    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


def package_versions() -> dict[str, str | None]:
    """Versions of the packages for planning and reports; None where a package is absent."""
    found: dict[str, str | None] = {}
    for name in ("eplb-plugin", "torch", "numba", "numpy", "scipy", "matplotlib"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def engine_states(config: Path | None = None) -> list[EngineState]:
    """State of each engine by its metadata, the environment and the configuration file.

    Args:
        config: the file; None is the file in EPLB_PLUGIN_CONFIG, which engines read.

    Raises:
        ConfigError, TraceError: the file cannot be read.
    """
    return [_state(adapter, config) for adapter in adapters()]


def _state(adapter: Adapter, config: Path | None) -> EngineState:
    installed, problems, notes = _installed(adapter.package), [], []
    plugin, options = adapter.how_to_enable, {}
    try:
        found = adapter.in_file(config)
        options = dict(found.options)
        if found.enabled_by is not None:
            plugin = f"on by {found.enabled_by}"
    except ConfigError as error:
        problems.append(str(error))
    if installed is not None:
        problems += _obstacles(adapter)
        untested = adapter.untested(installed.partition(" ")[0])
        notes += [untested] if untested else []
    return EngineState(adapter.name, installed, plugin, tuple(problems), tuple(notes), options)


def _installed(module: str) -> str | None:
    """`1.2.0`, or `1.2.0 (NAME)` where the package has another name than the module; None if absent."""
    for name in sorted(set(packages_distributions().get(module, []))):
        return version(name) if name == module else f"{version(name)} ({name})"
    return None


def _obstacles(adapter: Adapter) -> list[str]:
    """Reasons why the engine would not load the plugin."""
    ours = [item for item in entry_points(group=adapter.entry_points) if item.name == _PLUGIN]
    if not ours:
        return [
            f"{adapter.name} cannot find the plugin: no entry point {_PLUGIN} in the group "
            f"{adapter.entry_points}"
        ]
    problems = []
    module = ours[0].value.partition(":")[0]
    try:
        there = find_spec(module) is not None
    except ModuleNotFoundError:
        there = False
    if not there:
        problems.append(f"{adapter.name} would look for the plugin in {module}, which is not there")
    variable = adapter.allowed_plugins
    allowed = allowed_plugins(variable, empty_is_all=adapter.empty_allows_all)
    if allowed is not None and _PLUGIN not in allowed:
        problems.append(f"{variable}={','.join(allowed)} keeps {adapter.name} from loading {_PLUGIN}")
    return problems
