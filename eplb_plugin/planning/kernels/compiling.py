"""How kernels are compiled, and how their cache on disk notices a change of any kernel.

Numba keys its cache by the file of the cached function, and misses changes of functions in other files.
Therefore only entry points are cached, with all callees compiled into them. An entry point closes over
`SOURCES`, a digest of this folder: numba adds closure values to the key of the cache.
"""

from __future__ import annotations

import hashlib
from importlib.resources import files
from typing import Any

import numba
from numba.extending import register_jitable

from ...core.jit import cached_njit

__all__ = ["SOURCES", "copy_into", "entry_point", "inlined", "jitable", "jitted"]

# Python calls entry points only. Wrappers for Python would take a tenth of the compile time.
_INTERNAL: dict[str, Any] = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}

jitable = register_jitable(fastmath=False, boundscheck=False, error_model="numpy", **_INTERNAL)
"""For functions that tests also run as plain Python."""

jitted = numba.njit(nogil=True, fastmath=False, boundscheck=False, error_model="numpy", **_INTERNAL)
"""For the search over snapshots: it compiles in half the time of `jitable`."""

inlined = numba.njit(fastmath=False, boundscheck=False, error_model="numpy", inline="always")
"""For functions with one caller. LLVM would optimise them twice: alone, and within the caller."""

entry_point = cached_njit(nogil=True, fastmath=False, boundscheck=False, error_model="numpy")
"""For functions that Python calls."""


def _digest_of_sources() -> int:
    """62 bits of a digest of all modules of this folder."""
    digest = hashlib.sha256()
    for file in sorted(files(__package__).iterdir(), key=lambda file: file.name):
        if file.name.endswith(".py"):
            content = file.read_bytes()
            digest.update(f"{file.name} {len(content)}\n".encode())
            digest.update(content)
    return int.from_bytes(digest.digest()[:8], "big") >> 2


SOURCES = _digest_of_sources()


@jitable
def copy_into(target, source):
    """Copy an array element by element; shapes must agree.

    A slice assignment takes seconds to compile, for the message of its shape error.
    """
    for at in range(target.shape[0]):
        target[at] = source[at]
