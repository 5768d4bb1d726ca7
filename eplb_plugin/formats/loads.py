"""The formats of recorded loads: their names, how a file is recognised, who reads and who writes it."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from ..core.errors import TraceError
from ..core.safe_files import check_output
from ..offline.traces import LoadTrace, TokenTrace
from .benchmark_json import read_benchmark_json, write_benchmark_json
from .csv_table import read_csv, write_csv
from .npz import MAX_BYTES, read_npz_trace, save_load_trace
from .sglang_dump import read_sglang_dump, write_sglang_dump
from .tensorrt_llm_statistics import (
    META_FILE,
    check_statistics_output,
    read_tensorrt_llm_statistics,
    write_tensorrt_llm_statistics,
)

__all__ = ["LOAD_FORMATS", "LoadFormat", "format_for_output", "read_trace", "recognise", "write_load"]


@dataclass(frozen=True)
class LoadFormat:
    """A format of recorded loads.

    Attributes:
        name: what it is called on the command line.
        suffix: of its files; empty where it is a folder.
        read: `read(path, max_bytes)`.
    """

    name: str
    suffix: str
    read: Callable[[Path, int], LoadTrace | TokenTrace]


LOAD_FORMATS: Mapping[str, LoadFormat] = MappingProxyType(
    {
        item.name: item
        for item in (
            LoadFormat("npz", ".npz", read_npz_trace),
            LoadFormat("sglang", ".pt", read_sglang_dump),
            LoadFormat("benchmark-json", ".json", read_benchmark_json),
            LoadFormat("tensorrt-llm", "", read_tensorrt_llm_statistics),
            LoadFormat("csv", ".csv", read_csv),
        )
    }
)
"""All formats, by name."""

_WRITERS: Mapping[str, Callable[[Path, LoadTrace], None]] = MappingProxyType(
    {
        "npz": save_load_trace,
        "sglang": write_sglang_dump,
        "benchmark-json": write_benchmark_json,
        "csv": write_csv,
    }
)


def recognise(path: Path) -> LoadFormat:
    """The format of what is at `path`: by what a folder or an archive holds, else by the suffix.

    Raises:
        TraceError: there is nothing, or it is of no known format.
    """
    # Unlike those of Path, these functions know an answer for names that no file can have.
    if os.path.isdir(path):
        if (path / META_FILE).exists():
            return LOAD_FORMATS["tensorrt-llm"]
        if any(path.glob("*.pt")):
            return LOAD_FORMATS["sglang"]
        raise TraceError(f"{path}: a folder with neither {META_FILE} (TensorRT-LLM) nor .pt files (SGLang)")
    if path.name == META_FILE:
        raise TraceError(f"{path}: TensorRT-LLM's statistics are read from the folder {path.parent}")
    try:
        with zipfile.ZipFile(path) as archive:
            pickled = any(name.endswith("/data.pkl") for name in archive.namelist())
        return LOAD_FORMATS["sglang" if pickled else "npz"]
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, ValueError):
        pass  # no archive, or a damaged one, of which the reader of its suffix says what is wrong
    by_suffix = {item.suffix: item for item in LOAD_FORMATS.values() if item.suffix}
    try:
        return by_suffix[path.suffix.lower()]
    except KeyError:
        if not os.path.exists(path):
            raise TraceError(f"{path}: no such file") from None
        raise TraceError(f"{path}: of no known format; files end in {', '.join(by_suffix)}") from None


def format_for_output(path: Path, name: str | None) -> LoadFormat:
    """The format called `name`, or the one that the suffix of `path` stands for; `path` is checked for it.

    Raises:
        TraceError: there is none, the suffix stands for another one, or nothing can be written there.
    """
    if name is not None and name not in LOAD_FORMATS:
        raise TraceError(f"no format {name!r}; there are {', '.join(LOAD_FORMATS)}")
    by_suffix = {item.suffix: item for item in LOAD_FORMATS.values() if item.suffix}
    meant = by_suffix.get(path.suffix.lower())
    form = meant if name is None else LOAD_FORMATS[name]
    if form is not None:
        if meant not in (None, form):
            raise TraceError(f"{path}: would hold the format {form.name} under the suffix {path.suffix}")
        check = check_output if form.suffix else check_statistics_output
        check(path)
        return form
    known = ", ".join(f"{item.name} ({item.suffix or 'a folder'})" for item in LOAD_FORMATS.values())
    raise TraceError(f"{path}: its suffix names no format; there are {known}")


def write_load(path: Path, trace: LoadTrace, form: LoadFormat, top_k: int | None = None) -> None:
    """Write `trace` in a format.

    Args:
        path: the file or folder.
        trace: the load.
        form: which format.
        top_k: experts per token; only TensorRT-LLM's statistics name them.

    Raises:
        TraceError: it cannot be written, or `top_k` is missing or not wanted.
    """
    if form.name in _WRITERS:
        if top_k is not None:
            raise TraceError(f"the format {form.name} has no place for --top-k {top_k}")
        _WRITERS[form.name](path, trace)
        return
    if top_k is None:
        raise TraceError(f"{path}: the format {form.name} names the experts per token: give --top-k")
    write_tensorrt_llm_statistics(path, trace, top_k)


def read_trace(path: str | Path, max_bytes: int = MAX_BYTES) -> LoadTrace | TokenTrace:
    """Read a trace of any format that `docs/formats.md` lists; which one follows from what is there.

    Args:
        path: a file or, for formats with a file per rank, a folder.
        max_bytes: bound on the unpacked size.

    Raises:
        TraceError: the file is damaged, too large, of no known kind, or holds values that make no sense.
    """
    # The formats are made of the values above.
    from ..formats.loads import recognise

    return recognise(Path(path)).read(Path(path), max_bytes)
