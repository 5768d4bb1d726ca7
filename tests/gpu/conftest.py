"""Without a GPU all of it is skipped."""

from __future__ import annotations

import pytest
import torch

import eplb_plugin as eplb


@pytest.fixture(autouse=True)
def _gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")


@pytest.fixture(scope="session")
def compiled() -> None:
    """The planner, once here, not in each of the processes that tests start."""
    if torch.cuda.is_available():
        eplb.warmup()
