"""The command-line program: its commands, and errors of the package as one line."""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Annotated

import typer

from ..core.errors import EplbError
from .advise import advise
from .convert import convert
from .demo.command import demo
from .doctor import doctor
from .plan import plan
from .report import report
from .simulate import simulate

__all__ = ["app", "main"]

app = typer.Typer(
    name="eplb-plugin",
    help="Expert-parallel load balancing for mixture-of-experts serving engines.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (demo, simulate, plan, advise, report, doctor, convert):
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
