"""Files from strangers: bounded reading, schemas. Files of ours: written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from .errors import TraceError

__all__ = ["MAX_TEXT_BYTES", "check_output", "first_wrong", "read_bytes", "read_yaml", "written_whole"]

MAX_TEXT_BYTES = 512 * 2**20
"""Bound on the size of text files (JSON, YAML, CSV), which take a multiple of it in memory, in bytes."""

_DEEPEST = 32
_LONGEST_INTEGER = 64  # bits; Python refuses to write out integers of thousands of digits


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
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise TraceError(f"{path}: cannot be read: {error}") from None
    if len(content) > max_bytes:
        raise TraceError(f"{path}: is larger than the {max_bytes} bytes allowed")
    return content


def read_yaml(path: str | Path, max_bytes: int, max_values: int) -> Any:
    """What a YAML file holds, read by the safe loader.

    Args:
        path: the file.
        max_bytes: bound on its size.
        max_values: bound on the values in it, those that anchors repeat counted each time.

    Raises:
        TraceError: it is missing, too large, not YAML, or nested deeper than any file of use.
    """
    # Importing the package is to stay cheap.
    import yaml

    base = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

    class Loader(base):  # type: ignore[misc, valid-type]
        """Counts how deep it is: the compiled parser would overflow the stack of the process."""

        depth = 0

        def descend_resolver(self, node: Any, index: Any) -> None:
            self.depth += 1
            if self.depth > _DEEPEST:
                raise yaml.YAMLError(f"nested deeper than {_DEEPEST}")
            super().descend_resolver(node, index)

        def ascend_resolver(self) -> None:
            self.depth -= 1
            super().ascend_resolver()

    try:
        content = yaml.load(read_bytes(path, max_bytes), Loader)
    except TraceError:
        raise
    except Exception as error:  # values such as 2001-99-99 or !!bool x make it fail in many ways
        raise TraceError(f"{path}: not YAML: {' '.join(str(error).split())[:300]}") from None
    _check_size(content, path, max_values)
    return content


def _check_size(content: Any, path: str | Path, max_values: int) -> None:
    count = 1
    todo = [content]
    while todo:
        value = todo.pop()
        if isinstance(value, int) and value.bit_length() > _LONGEST_INTEGER:
            raise TraceError(f"{path}: holds an integer of {value.bit_length()} bits")
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        if isinstance(parts, (list, tuple, set)):
            count += len(parts)
            if count > max_values:
                raise TraceError(f"{path}: holds more than the {max_values} values allowed")
            todo.extend(parts)


def first_wrong(error: ValidationError) -> str:
    """The first violation of a schema and its place, in one line.

    Of a union, pydantic reports every type; the last one has the clearest message.
    """
    wrong = error.errors(include_url=False)
    told = [
        (".".join(str(part) for part in item["loc"] if part not in ("int", "float")), item["msg"])
        for item in wrong
    ]
    place, message = [item for item in told if item[0] == told[0][0]][-1]
    return f"{place}: {message}" if place else message


def check_output(path: str | Path) -> None:
    """Refuse a path that no file can be written to; commands do so before they work for it.

    Raises:
        TraceError: it is a folder (as an empty path is), something else that is no file, such as a device,
            which would be replaced, or in a folder that does not exist.
    """
    path = Path(path)
    if not path.name or os.path.isdir(path):
        raise TraceError(f"{path}: cannot be written: is a folder, not the name of a file")
    if os.path.exists(path) and not os.path.isfile(path):
        raise TraceError(f"{path}: cannot be written: is there already, and no file")
    if not os.path.isdir(path.parent):
        raise TraceError(f"{path}: cannot be written: there is no folder {path.parent}")


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """A file beside `path` to write to, which takes its place when the block ends without an error.

    Raises:
        TraceError: the file cannot be written.
    """
    path = Path(path)
    check_output(path)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield part
        part.replace(path)
    except OSError as error:
        # Whole, it would name the other file.
        raise TraceError(f"{path}: cannot be written: {error.strerror or error}") from None
    finally:
        part.unlink(missing_ok=True)
