"""What a file has that its schema does not allow, in one line."""

from __future__ import annotations

from pydantic import ValidationError

__all__ = ["first_wrong"]


def first_wrong(error: ValidationError) -> str:
    """The first thing that pydantic found wrong, with its place; the type tried last says it best."""
    wrong = error.errors(include_url=False)
    told = [
        (".".join(str(part) for part in item["loc"] if part not in ("int", "float")), item["msg"])
        for item in wrong
    ]
    place, message = [item for item in told if item[0] == told[0][0]][-1]
    return f"{place}: {message}" if place else message
