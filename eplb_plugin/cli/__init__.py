"""The command line: one module for each command; errors of the package are one line."""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Annotated

import typer

from ..core.errors import EplbError
from . import advise, convert, demo, doctor, plan, report, simulate

__all__ = ["app", "main"]

app = typer.Typer(
    name="eplb-plugin",
    help="Expert-parallel load balancing for mixture-of-experts serving engines.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_COMMANDS = (demo.demo, simulate.simulate, plan.plan, advise.advise, report.report, doctor.doctor)
for command in (*_COMMANDS, convert.convert):
    app.command()(command)


def _version(asked: bool) -> None:
    if asked:
        print(version("eplb-plugin"))
        raise typer.Exit


@app.callback()
def _root(
    asked: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Has the option `--version`."""


def main() -> None:
    """Entry point `eplb-plugin`. An error of the package is one line and exit code 2."""
    try:
        app()
    except EplbError as error:
        print(f"eplb-plugin: {error}", file=sys.stderr)
        raise SystemExit(2) from None
