"""Text files from strangers, read up to a bound, and files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import TraceError

__all__ = ["MAX_TEXT_BYTES", "read_bytes", "written_whole"]

MAX_TEXT_BYTES = 512 * 2**20
"""Bound on the size of text files (JSON, YAML, CSV), which take a multiple of it in memory, in bytes."""


def read_bytes(path: str | Path, max_bytes: int = MAX_TEXT_BYTES) -> bytes:
    """The content of a file.

    Raises:
        TraceError: it is missing, cannot be read, or is larger than `max_bytes`.
    """
    path = Path(path)
    try:
        with path.open("rb") as stream:
            content = stream.read(max_bytes + 1)
    except FileNotFoundError:
        raise TraceError(f"{path}: no such file") from None
    except OSError as error:
        raise TraceError(f"{path}: cannot be read: {error}") from None
    if len(content) > max_bytes:
        raise TraceError(f"{path}: is larger than the {max_bytes} bytes allowed")
    return content


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """A file beside `path` to write to, which takes its place when the block ends without an error.

    Raises:
        TraceError: the file cannot be written.
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield part
        part.replace(path)
    except OSError as error:
        raise TraceError(f"{path}: cannot be written: {error}") from None
    finally:
        part.unlink(missing_ok=True)
