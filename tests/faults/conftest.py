"""Collects the outcome of every fault and prints the table of all when the tests have ended."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from rich.console import Console

import eplb_plugin as eplb
from tests.faults.table import FAULT, SOAK, Record, Row, Soak, Use, markdown, recorder, show


@pytest.fixture(scope="session", autouse=True)
def _compiled() -> None:
    """The processes that tests start find the planner compiled."""
    eplb.warmup()


@pytest.fixture
def record(record_property) -> Record:
    return recorder(record_property)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    found = [item for report in terminalreporter.stats.get("passed", []) for item in report.user_properties]
    rows = [Row(**value) for name, value in found if name == FAULT]
    soaks = [
        Soak(**value | {"first": Use(**value["first"]), "last": Use(**value["last"])})
        for name, value in found
        if name == SOAK
    ]
    if not rows and not soaks:
        return
    show(rows, soaks, Console(width=200))
    path = os.environ.get("EPLB_FAULT_TABLE")
    if path:
        Path(path).write_text(markdown(rows, soaks), encoding="utf-8")
