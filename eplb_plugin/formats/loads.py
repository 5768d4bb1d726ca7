"""Registry of the formats of recorded loads: recognition, reading and writing. One module a format."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from ..core.errors import TraceError
from ..core.safe_files import MAX_BYTES, check_output, opened_zip
from ..offline.traces import LoadTrace, TokenTrace
from .benchmark_json import read_benchmark_json, write_benchmark_json
from .csv_table import read_csv, write_csv
from .npz import read_npz_trace, save_load_trace
from .recordings import is_recording, read_recording
from .sglang import read_sglang_dump, write_sglang_dump
from .tensorrt_llm import (
    META_FILE,
    check_statistics_output,
    read_tensorrt_llm_statistics,
    write_tensorrt_llm_statistics,
)

__all__ = ["LOAD_FORMATS", "LoadFormat", "format_for_output", "read_trace", "recognise", "write_load"]


@dataclass(frozen=True)
class LoadFormat:
    """A format of recorded loads. Its functions raise TraceError, in one line, and execute nothing of a file.

    Attributes:
        name: name on the command line.
        suffix: suffix of its files; empty for a folder.
        read: `read(path, max_bytes)`, with a bound on the unpacked size. Errors: the path is missing,
            damaged, too large, of another kind, or holds wrong values.
        write: `write(path, trace)`, with `top_k` as a third argument if `has_top_k`. Error: the path
            cannot be written.
        has_top_k: whether the format stores the number of experts per token, which a load lacks.
    """

    name: str
    suffix: str
    read: Callable[[Path, int], LoadTrace | TokenTrace]
    write: Callable[..., None]
    has_top_k: bool = False


_FORMATS = (
    LoadFormat("npz", ".npz", read_npz_trace, save_load_trace),
    LoadFormat("sglang", ".pt", read_sglang_dump, write_sglang_dump),
    LoadFormat("benchmark-json", ".json", read_benchmark_json, write_benchmark_json),
    LoadFormat("tensorrt-llm", "", read_tensorrt_llm_statistics, write_tensorrt_llm_statistics, True),
    LoadFormat("csv", ".csv", read_csv, write_csv),
)
LOAD_FORMATS: Mapping[str, LoadFormat] = MappingProxyType({item.name: item for item in _FORMATS})
"""All formats, by name."""

_BY_SUFFIX = {item.suffix: item for item in _FORMATS if item.suffix}


def recognise(path: Path) -> LoadFormat:
    """The format of a file or folder: by the content of a folder or archive, otherwise by the suffix.

    Raises:
        TraceError: the path is missing, or of no known format.
    """
    # The functions of os.path accept impossible file names; the methods of Path raise ValueError.
    if os.path.isdir(path):
        if (path / META_FILE).exists():
            return LOAD_FORMATS["tensorrt-llm"]
        if any(path.glob("*.pt")):
            return LOAD_FORMATS["sglang"]
        raise TraceError(
            f"{path}: a folder with neither recorded intervals (interval-*.npz), nor {META_FILE} "
            "(TensorRT-LLM), nor .pt files (SGLang)"
        )
    if path.name == META_FILE:
        raise TraceError(f"{path}: TensorRT-LLM's statistics are read from the folder {path.parent}")
    try:
        with opened_zip(path, "an archive") as archive:
            pickled = any(name.endswith("/data.pkl") for name in archive.namelist())
        return LOAD_FORMATS["sglang" if pickled else "npz"]
    except TraceError:
        pass  # the reader of its suffix has the better message
    try:
        return _BY_SUFFIX[path.suffix.lower()]
    except KeyError:
        if not os.path.exists(path):
            raise TraceError(f"{path}: no such file") from None
        raise TraceError(f"{path}: of no known format; files end in {', '.join(_BY_SUFFIX)}") from None


def format_for_output(path: Path, name: str | None) -> LoadFormat:
    """The format `name`, by default that of the suffix of `path`; checks that `path` can be written.

    Raises:
        TraceError: unknown format, a suffix of another format, or a path that cannot be written.
    """
    if name is not None and name not in LOAD_FORMATS:
        raise TraceError(f"no format {name!r}; there are {', '.join(LOAD_FORMATS)}")
    of_suffix = _BY_SUFFIX.get(path.suffix.lower())
    form = of_suffix if name is None else LOAD_FORMATS[name]
    if form is None:
        known = ", ".join(f"{item.name} ({item.suffix or 'a folder'})" for item in _FORMATS)
        raise TraceError(f"{path}: its suffix names no format; there are {known}")
    if of_suffix not in (None, form):
        raise TraceError(f"{path}: would hold the format {form.name} under the suffix {path.suffix}")
    (check_output if form.suffix else check_statistics_output)(path)
    return form


def write_load(path: Path, trace: LoadTrace, form: LoadFormat, top_k: int | None = None) -> None:
    """Write `trace` to a file or folder.

    Args:
        path: the file or folder.
        trace: the load.
        form: the format.
        top_k: experts per token, required by formats with `has_top_k` and refused by the others.

    Raises:
        TraceError: `path` cannot be written, or `top_k` is missing or refused.
    """
    if form.has_top_k and top_k is None:
        raise TraceError(f"{path}: the format {form.name} names the experts per token: give --top-k")
    if top_k is not None and not form.has_top_k:
        raise TraceError(f"the format {form.name} has no place for --top-k {top_k}")
    form.write(path, trace, *([] if top_k is None else [top_k]))


def read_trace(path: str | Path, max_bytes: int = MAX_BYTES) -> LoadTrace | TokenTrace:
    """Read a trace of any format of `docs/formats.md`.

    Args:
        path: a file, the folder of a format with one file per rank, or the folder of a recording.
        max_bytes: bound on the unpacked size.

    Raises:
        TraceError: the path is missing, damaged, too large, of no known format, or holds wrong values.
    """
    path = Path(path)
    if is_recording(path):
        return read_recording(path, max_bytes).trace
    return recognise(path).read(path, max_bytes)
