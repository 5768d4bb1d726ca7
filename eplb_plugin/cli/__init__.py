"""The command line: one module for each command."""

from .entry import app, main

__all__ = ["app", "main"]
