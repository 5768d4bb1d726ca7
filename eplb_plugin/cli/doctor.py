"""`eplb-plugin doctor`: versions, engines, a self-test, and the options in force."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from ..config.sources import CONFIG_VARIABLE, Settings, load_settings
from .console import compiling
from .installation import EngineState, engine_states, package_versions
from .selftest import SelfTest, self_test

__all__ = ["doctor"]

_ALWAYS_SHOWN = ("planner", "rebalancer")


@dataclass(frozen=True)
class _Option:
    value: Any
    origin: str


def doctor(
    config: Annotated[Path | None, typer.Option(help="YAML file with options.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON instead.")] = False,
) -> None:
    """Check the installation: versions, engines, a self-test, and every option with where it comes from.

    Exit code 1 means a problem, which the last lines name.
    """
    settings = load_settings(config)
    with compiling(Console(stderr=True), "testing"):
        versions, engines = package_versions(), engine_states(config)
        tested = self_test(settings.planner)
    options = _options(settings) | _engine_options(engines, config)
    problems = [*tested.problems, *(line for engine in engines for line in engine.problems)]
    if as_json:
        content = {
            "python": platform.python_version(),
            "packages": versions,
            "engines": [asdict(engine) for engine in engines],
            "policy": settings.planner.policy,
            "self_test": asdict(tested),
            "options": {name: asdict(option) for name, option in options.items()},
            "problems": problems,
        }
        print(json.dumps(content))
    else:
        _show(Console(), versions, engines, settings.planner.policy, tested, options, problems)
    if problems:
        raise typer.Exit(1)


def _show(
    console: Console,
    versions: dict[str, str | None],
    engines: list[EngineState],
    policy: str,
    tested: SelfTest,
    options: dict[str, _Option],
    problems: list[str],
) -> None:
    rows = [("Python", f"{platform.python_version()} on {platform.platform()}")]
    rows += [(name, number or "not installed") for name, number in versions.items()]
    rows.append(("accelerator", torch.cuda.get_device_name() if torch.cuda.is_available() else "none"))
    console.print(_table("Installed", rows))
    rows = []
    for engine in engines:
        rows.append((engine.name, engine.version or "not installed"))
        if engine.version:
            rows.append(("", f"plugin: {engine.plugin}"))
    console.print(_table("Engines", rows))
    rows = [
        ("policy", policy),
        (
            "self-test",
            f"{'failed' if tested.problems else 'passed'}: balancedness {tested.before:.3f} to "
            f"{tested.after:.3f}",
        ),
        (
            "time",
            f"{tested.plan_ms:.1f} ms a plan; first plans, which load the planner, {tested.first_ms:.0f} ms",
        ),
    ]
    console.print(_table("Planning", rows))
    table = Table(title="Options in force", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("option", no_wrap=True)
    for name in ("value", "from"):
        table.add_column(name, overflow="fold")
    for name, option in options.items():
        style = None if option.origin == "default" else "bold"
        table.add_row(name, json.dumps(option.value), option.origin, style=style)
    console.print(table)
    for engine in engines:
        for line in engine.notes:
            console.print(f"note: {line}", style="yellow", highlight=False, soft_wrap=True)
    for line in problems:
        console.print(f"problem: {line}", style="bold red", highlight=False, soft_wrap=True)
    if not problems:
        console.print("no problems found")


def _table(title: str, rows: list[tuple[str, str]]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _options(settings: Settings) -> dict[str, _Option]:
    """All options of the planner and of the online loop, and options of commands where they are set."""
    found = {}
    for section, options in settings.model_dump(mode="json").items():
        for option, value in options.items():
            name = f"{section}.{option}"
            origin = settings.origins.get(name, "default")
            if section in _ALWAYS_SHOWN or origin != "default":
                found[name] = _Option(value, origin)
    return found


def _engine_options(engines: list[EngineState], config: Path | None) -> dict[str, _Option]:
    """Options of the file for engines alone; commands ignore them."""
    file = config or f"the file of {CONFIG_VARIABLE}"
    return {
        name: _Option(value, f"{file}, for {engine.name}")
        for engine in engines
        for name, value in engine.options.items()
    }
