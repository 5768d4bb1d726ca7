"""Collects the outcome of every fault and prints the table of all when the tests have ended."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from rich.console import Console

import eplb_plugin as eplb
from tests.faults.table import PROPERTY, Record, Row, markdown, recorder, show


@pytest.fixture(scope="session", autouse=True)
def _compiled() -> None:
    """The processes that tests start find the planner compiled."""
    eplb.warmup()


@pytest.fixture
def record(record_property) -> Record:
    return recorder(record_property)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    rows = [
        Row(**value)
        for report in terminalreporter.stats.get("passed", [])
        for name, value in report.user_properties
        if name == PROPERTY
    ]
    if not rows:
        return
    show(rows, Console(width=200))
    path = os.environ.get("EPLB_FAULT_TABLE")
    if path:
        Path(path).write_text(markdown(rows), encoding="utf-8")
