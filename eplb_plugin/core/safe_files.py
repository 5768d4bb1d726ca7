"""Bounded reading of untrusted files (text, JSON, YAML, zip), and atomic writing of our own."""

from __future__ import annotations

import os
import reprlib
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from .errors import TraceError

__all__ = [
    "MAX_BYTES",
    "MAX_TEXT_BYTES",
    "check_output",
    "checked_schema",
    "opened_zip",
    "read_bytes",
    "read_json",
    "read_yaml",
    "written_whole",
]

MAX_BYTES = 2 * 2**30
"""Default bound on the unpacked size of a binary file, in bytes."""

MAX_TEXT_BYTES = 512 * 2**20
"""Bound on the size of a text file (JSON, YAML, CSV), in bytes. Parsing takes a multiple of it in memory."""

_DEEPEST = 32
_YAML_MERGES = ("tag:yaml.org,2002:merge", "tag:yaml.org,2002:value")
_LONGEST_INTEGER = 64  # bits; Python refuses to print integers of thousands of digits

_Schema = TypeVar("_Schema", bound=BaseModel)


def read_bytes(path: str | Path, max_bytes: int = MAX_TEXT_BYTES) -> bytes:
    """Read a whole file.

    Raises:
        TraceError: the file is missing, unreadable, or larger than `max_bytes`.
    """
    path = Path(path)
    try:
        with path.open("rb") as stream:
            content = stream.read(max_bytes + 1)
    except FileNotFoundError:
        raise TraceError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise TraceError(f"{path}: is a folder, not a file") from None
    except (OSError, ValueError) as error:  # ValueError: an impossible file name
        raise TraceError(f"{path}: cannot be read: {error}") from None
    if len(content) > max_bytes:
        raise TraceError(f"{path}: is larger than the {max_bytes} bytes allowed")
    return content


def read_json(path: Path, schema: type[_Schema], max_bytes: int = MAX_TEXT_BYTES) -> _Schema:
    """Read a JSON file by a schema.

    Raises:
        TraceError: the file is missing, too large, or violates the schema.
    """
    content = read_bytes(path, max_bytes)
    with checked_schema(path):
        return schema.model_validate_json(content)


@contextmanager
def checked_schema(path: Path) -> Iterator[None]:
    """Turn a violation of a schema into a TraceError of one line: the first violation and its place."""
    try:
        yield
    except ValidationError as error:
        # For a union, pydantic reports every type at the same place; the last message is the clearest.
        told = [
            (".".join(str(part) for part in item["loc"] if part not in ("int", "float")), item["msg"])
            for item in error.errors(include_url=False)
        ]
        place, message = [item for item in told if item[0] == told[0][0]][-1]
        raise TraceError(f"{path}: {place}: {message}" if place else f"{path}: {message}") from None


def read_yaml(path: str | Path, max_bytes: int, max_values: int) -> Any:
    """Read a YAML file by the safe loader.

    Args:
        max_bytes: bound on its size.
        max_values: bound on the number of values; an alias counts like a copy of its anchor.

    Raises:
        TraceError: the file is missing, too large, not YAML, or nested deeper than 32 levels; a mapping has a
            key twice.
    """
    # Importing the package is to stay cheap.
    import yaml

    base = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

    class Loader(base):  # type: ignore[misc, valid-type]
        """Bounds the depth: deep nesting would overflow the stack of the compiled parser. Refuses a key that
        a mapping has twice: the safe loader keeps the last one."""

        depth = 0

        def __init__(self, stream: Any) -> None:
            super().__init__(stream)
            self.checked: set[int] = set()

        def flatten_mapping(self, node: Any) -> None:
            # Called before keys of another mapping are merged in; again where it is merged into another one.
            if id(node) not in self.checked:
                self.checked.add(id(node))
                seen = set()
                for key, _ in node.value:
                    if not isinstance(key, yaml.ScalarNode) or key.tag in _YAML_MERGES:
                        continue
                    value = self.construct_object(key)
                    if value in seen:
                        line = key.start_mark.line + 1
                        raise TraceError(f"{path}: line {line}: the key {reprlib.repr(value)} is there twice")
                    seen.add(value)
            super().flatten_mapping(node)

        def descend_resolver(self, node: Any, index: Any) -> None:
            self.depth += 1
            if self.depth > _DEEPEST:
                raise yaml.YAMLError(f"nested deeper than {_DEEPEST}")
            super().descend_resolver(node, index)

        def ascend_resolver(self) -> None:
            self.depth -= 1
            super().ascend_resolver()

    data = read_bytes(path, max_bytes)
    try:
        content = yaml.load(data, Loader)
    except TraceError:
        raise
    except Exception as error:  # values such as 2001-99-99 or !!bool x raise many types
        raise TraceError(f"{path}: not YAML: {' '.join(str(error).split())[:300]}") from None
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
    return content


@contextmanager
def opened_zip(path: Path, kind: str) -> Iterator[zipfile.ZipFile]:
    """Open a zip archive for reading; nothing is unpacked yet.

    Args:
        kind: name of the format for errors, such as `a readable .npz (zip) file`.

    Raises:
        TraceError: the file is missing, unreadable or no zip archive, or a read in the block fails.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except TraceError:  # a ValueError too
        raise
    except FileNotFoundError:
        raise TraceError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise TraceError(f"{path}: is a folder, not {kind}") from None
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError, ValueError) as error:
        raise TraceError(f"{path}: not {kind}: {error}") from None


def check_output(path: str | Path) -> None:
    """Check before a long computation that a file can be written.

    Raises:
        TraceError: the path is a folder, a special file such as a device, or in a missing folder.
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
    """Write a file atomically: the block writes to a file beside `path`, which then replaces `path`.

    After an error in the block, `path` is unchanged.

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
        # The full message would name the temporary file.
        raise TraceError(f"{path}: cannot be written: {error.strerror or error}") from None
    finally:
        part.unlink(missing_ok=True)
