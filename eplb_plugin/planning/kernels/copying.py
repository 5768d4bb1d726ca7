"""Copies of arrays whose shapes are known to agree."""

from __future__ import annotations

from .compiling import _compile


@_compile
def _copy(source, target):
    """Copy element by element. An assignment of slices takes seconds to compile, for the message of an error
    about their shapes."""
    for at in range(target.shape[0]):
        target[at] = source[at]
