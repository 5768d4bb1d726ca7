"""Environment variables beside the options: folders, allowed plugins, variables for workers."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["allowed_plugins", "cache_folder", "metrics_folder", "pass_on"]


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
    """Let an engine copy the variables with `prefix`, if there are any, to its workers.

    Args:
        prefix: prefix of the variables' names.
        variable: the engine's comma-separated list of such prefixes.
    """
    if any(name.startswith(prefix) for name in os.environ):
        known = filter(None, os.environ.get(variable, "").split(","))
        os.environ[variable] = ",".join(dict.fromkeys([*known, prefix]))
