"""Compile the planner once here, not in each of the processes that tests start."""

from __future__ import annotations

import pytest

import eplb_plugin as eplb


@pytest.fixture(scope="session", autouse=True)
def _compiled() -> None:
    eplb.warmup()
