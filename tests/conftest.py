"""What a plain run leaves out."""

from __future__ import annotations

from pathlib import Path

import pytest

FAULTS = Path(__file__).parent / "faults"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`make test-faults` names its folder: minutes of processes that are killed and stopped."""
    if collection_path == FAULTS and not any("faults" in argument for argument in config.args):
        return True
    return None
