"""Words that several commands say."""

from __future__ import annotations

__all__ = ["COMMAND_LINE", "counted"]

COMMAND_LINE = "command line"
"""What `Settings.origins` calls the command line."""


def counted(number: int, word: str) -> str:
    """`1 step`, `2 steps`; of a word whose plural ends in s."""
    return f"{number} {word}{'' if number == 1 else 's'}"
