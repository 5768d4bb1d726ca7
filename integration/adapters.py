"""The engines that this package plugs into. A new engine is one folder here and one name in ENGINES."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

__all__ = ["Adapter", "ENGINES", "InFile", "adapters"]

ENGINES = ("vllm", "sglang")
"""Folders beside this file; the module `plugin` of each has an ADAPTER and imports no engine by itself."""


@dataclass(frozen=True)
class InFile:
    """What a configuration file says about one engine.

    Attributes:
        enabled_by: the part of the configuration that enables the plugin; None where nothing does.
        options: options for this engine alone, by `section.option`, as they were understood.
    """

    enabled_by: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """One engine, described without importing it.

    Attributes:
        name: as people write it.
        package: its import name.
        entry_points: group of entry points in which the engine looks for plugins.
        allowed_plugins: environment variable with the plugins that the engine may load.
        empty_allows_all: whether that variable counts as unset when it is empty.
        tested: releases that the tests run with; `0.32` stands for 0.32.0 and all later 0.32.x.
        checked: releases that have all that the plugin uses, by the signatures in their wheels; not run.
        how_to_enable: the words for `doctor` where the configuration does not enable the plugin.
        in_file: reads a configuration file; None is the file in EPLB_PLUGIN_CONFIG. Raises ConfigError.
    """

    name: str
    package: str
    entry_points: str
    allowed_plugins: str
    empty_allows_all: bool
    tested: tuple[str, ...]
    how_to_enable: str
    checked: tuple[str, ...] = ()
    in_file: Callable[[Path | None], InFile] = lambda config: InFile()

    def untested(self, version: str) -> str | None:
        """A sentence for a release that was not tested, else None."""
        if any(version == item or version.startswith(f"{item}.") for item in self.tested):
            return None
        tested = f"eplb_plugin was tested with {self.name} {', '.join(self.tested)}"
        if version in self.checked:
            return f"{tested}; of {version}, the signatures of what it uses were checked"
        return f"{tested}, not {version}"


def adapters() -> tuple[Adapter, ...]:
    """All adapters, in the order of ENGINES."""
    return tuple(import_module(f"{__package__}.{engine}.plugin").ADAPTER for engine in ENGINES)
