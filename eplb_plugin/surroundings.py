"""What the environment says beside the options: folders, and which plugins engines may load."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["allowed_plugins", "cache_folder", "metrics_folder"]


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
