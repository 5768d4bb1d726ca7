"""What a plain run leaves out, and that every run draws the same examples."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

# What fails is then the change at hand. `make fuzz` draws other examples, by `--hypothesis-profile=default`.
settings.register_profile("same", derandomize=True)
settings.load_profile("same")

APART = ("faults", "wheels")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Some targets name their folder: processes that are killed for minutes, downloads of wheels."""
    for name in APART:
        if collection_path == Path(__file__).parent / name and not any(name in part for part in config.args):
            return True
    return None
