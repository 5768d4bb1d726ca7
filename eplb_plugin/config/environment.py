"""What the environment says beside the options: folders, plugins engines load, what workers get of it."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["allowed_plugins", "cache_folder", "metrics_folder", "pass_on"]


def cache_folder() -> Path:
    """Where results that can be computed again are kept: under XDG_CACHE_HOME, else under ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME")
    # Relative paths are to be ignored, says the specification of that variable.
    folder = Path(base) if base and Path(base).is_absolute() else Path.home() / ".cache"
    return folder / "eplb-plugin"


def metrics_folder() -> Path | None:
    """Where the processes of an engine put their series for its server to read; None: nowhere."""
    folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    return Path(folder) if folder else None


def allowed_plugins(variable: str, *, empty_is_all: bool) -> tuple[str, ...] | None:
    """The plugins that an engine's variable allows, as a list with commas; None where it allows all.

    Args:
        variable: VLLM_PLUGINS or SGLANG_PLUGINS.
        empty_is_all: whether an empty value is taken as if it were not set.
    """
    value = os.environ.get(variable)
    if value is None or (empty_is_all and not value.strip()):
        return None
    return tuple(name.strip() for name in value.split(","))


def pass_on(prefix: str, variable: str) -> None:
    """Where there are variables with a prefix, add it to those that an engine copies to its workers.

    Args:
        prefix: of names.
        variable: the engine's list of prefixes, with commas.
    """
    if any(name.startswith(prefix) for name in os.environ):
        known = filter(None, os.environ.get(variable, "").split(","))
        os.environ[variable] = ",".join(dict.fromkeys([*known, prefix]))
