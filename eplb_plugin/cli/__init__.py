"""The command line: one file per command, and one way to fail."""

from .app import app, main

__all__ = ["app", "main"]
