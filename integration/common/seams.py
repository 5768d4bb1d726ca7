"""A seam: a name of an engine that the plugin wraps, calls or reads; and what an engine lacks of them."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any, NamedTuple

__all__ = ["Seam", "has_member", "missing_here", "seams_of"]


_BOUND = ("self", "cls")


class Seam(NamedTuple):
    """One name, for the check in a running engine and for that of an unpacked wheel.

    Attributes:
        target: full name of a module's function, class or constant, or of a class's method or attribute.
        arguments: parameters that it must take; of a class: those of its constructor.
        exactly: whether these have to be all of its parameters, `self` and `cls` aside.
    """

    target: str
    arguments: tuple[str, ...] = ()
    exactly: bool = False

    def wrong_arguments(self, known: Iterable[str]) -> list[str]:
        """One line for each parameter that is missing, or one for all where they must be exact."""
        found, wanted = ([name for name in given if name not in _BOUND] for given in (known, self.arguments))
        if self.exactly and sorted(found) != sorted(wanted):
            return [f"{self.target} takes ({', '.join(found)}), not ({', '.join(wanted)})"]
        return [f"{self.target} has no argument {name!r}" for name in wanted if name not in found]


def seams_of(targets: Mapping[str, tuple[str, ...]]) -> tuple[Seam, ...]:
    """The seams of a table of names and arguments."""
    return tuple(Seam(target, arguments) for target, arguments in targets.items())


def missing_here(seams: Iterable[Seam]) -> list[str]:
    """What the engine in this process lacks, one line for each name and argument; imports their modules."""
    missing = []
    for seam in seams:
        try:
            found = _resolve(seam.target)
        except (ImportError, AttributeError) as error:
            missing.append(f"{seam.target} is missing ({error})")
            continue
        if found is None and seam.arguments:
            missing.append(f"{seam.target} is no function")
        elif seam.arguments or seam.exactly:
            missing += seam.wrong_arguments(inspect.signature(found).parameters)
    return missing


def has_member(owner: type, name: str) -> bool:
    """Whether a class has a member, or its instances have a field of that name."""
    return hasattr(owner, name) or _is_field(owner, name)


def _resolve(target: str) -> Any:
    """The object of a name; None for a field that only instances have.

    Raises:
        ImportError, AttributeError: there is none.
    """
    parts = target.split(".")
    found: Any = import_module(parts[0])
    for place, part in enumerate(parts[1:], 1):
        if isinstance(found, type) and not hasattr(found, part):
            if place == len(parts) - 1 and _is_field(found, part):
                return None
            raise AttributeError(f"{found.__qualname__} has no {part}")
        if not hasattr(found, part):
            import_module(".".join(parts[: place + 1]))
        found = getattr(found, part)
    return found


def _is_field(owner: type, name: str) -> bool:
    """Whether a class annotates `name`, or a method of it assigns it: instances have it then."""
    for base in owner.__mro__:
        if name in vars(base).get("__annotations__", {}):
            return True
        for member in vars(base).values():
            code = getattr(inspect.unwrap(member) if inspect.isfunction(member) else None, "__code__", None)
            if code is not None and any(
                item.opname == "STORE_ATTR" and item.argval == name for item in dis.get_instructions(code)
            ):
                return True
    return False
