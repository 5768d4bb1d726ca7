"""How kernels are compiled, and how their cache on disk notices every change of them.

Numba keys its cache by the file of the cached function, so it would not notice a change of a function that
lives in another one. Therefore only entrances are cached, with all that they call compiled into them, and an
entrance closes over `sources`: values of a closure belong to the key of the cache.
"""

from __future__ import annotations

import hashlib
from importlib.resources import files
from typing import Any

import numba
from numba.extending import register_jitable

from ...core.jit import cached_njit

__all__ = ["SOURCES", "compile_entrance"]

# Only entrances are called from Python: wrappers for that would take a tenth of the time of compiling.
_WITHIN: dict[str, Any] = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
_compile = register_jitable(fastmath=False, boundscheck=False, error_model="numpy", **_WITHIN)
# For the search over snapshots, which takes half the time when it is compiled as functions of their own.
_compile_apart = numba.njit(nogil=True, fastmath=False, boundscheck=False, error_model="numpy", **_WITHIN)
# For what has one caller: LLVM optimises every function by itself, and again within each of its callers.
_compile_in_place = numba.njit(fastmath=False, boundscheck=False, error_model="numpy", inline="always")
compile_entrance = cached_njit(nogil=True, fastmath=False, boundscheck=False, error_model="numpy")


def _digest_of_sources() -> int:
    """62 bits of a digest of all files of this folder."""
    digest = hashlib.sha256()
    for file in sorted(files(__package__).iterdir(), key=lambda file: file.name):
        if file.name.endswith(".py"):
            content = file.read_bytes()
            digest.update(f"{file.name} {len(content)}\n".encode())
            digest.update(content)
    return int.from_bytes(digest.digest()[:8], "big") >> 2


SOURCES = _digest_of_sources()
