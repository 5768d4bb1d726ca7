"""The command line: one file per command, and one way to fail."""

from .entry import app, main

__all__ = ["app", "main"]
