"""The package's own `.npz` traces of loads and tokens. Nothing is unpickled, and sizes are bounded."""

from __future__ import annotations

import math
import reprlib
import zipfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy

from ..core.errors import TraceError
from ..core.safe_files import MAX_BYTES, opened_zip, written_whole
from ..offline.traces import LoadTrace, TokenTrace, as_load

__all__ = [
    "NpzArrays",
    "check_unique",
    "layer_ids_of",
    "read_npz_placement",
    "read_npz_trace",
    "save_load_trace",
]

_MAX_HEADER = 4096
# 100 layers of 1,000 slots are 0.8 MB. As lists, ids take several times that in memory.
_MAX_PLACEMENT = 64 * 2**20


def read_npz_trace(path: str | Path, max_bytes: int = MAX_BYTES) -> LoadTrace | TokenTrace:
    """Read a load, or a token trace; the arrays of the file decide which. Other arrays are ignored.

    Args:
        path: `.npz` with `load [steps, layers, experts]` and optionally `layer_ids [layers]`, or with
            `topk_ids [tokens, layers, top_k]`, `request [tokens]`, `category [requests]` and `num_experts`.
        max_bytes: bound on the unpacked size.

    Raises:
        TraceError: the file is missing, damaged, too large, of neither kind, or holds wrong values.
    """
    path = Path(path)
    with opened_zip(path, "a readable .npz (zip) file") as archive:
        arrays = NpzArrays(archive, path, max_bytes)
        name = str(path)
        if ("load" in arrays.names) == ("topk_ids" in arrays.names):
            raise TraceError(
                f"{name}: expected either an array 'load' or an array 'topk_ids'; the file has "
                f"{sorted(arrays.names)}"
            )
        if "load" in arrays.names:
            return LoadTrace(as_load(arrays.read("load"), name), name, layer_ids_of(arrays))
        num_experts = arrays.number("num_experts")
        return TokenTrace(
            arrays.read("topk_ids"),
            arrays.read("request"),
            arrays.read("category"),
            num_experts,
            name,
        )


def save_load_trace(path: str | Path, trace: LoadTrace) -> None:
    """Write `trace` as a compressed `.npz`, atomically.

    Raises:
        TraceError: the file cannot be written.
    """
    with written_whole(path) as part, part.open("wb") as stream:
        np.savez_compressed(stream, load=trace.load.numpy(), layer_ids=np.array(trace.layer_ids, np.int64))


def read_npz_placement(
    path: str | Path, max_bytes: int = _MAX_PLACEMENT
) -> tuple[dict[int, list[int]], int | None, int | None, int | None, tuple[int, ...] | None]:
    """Read the placement of a `.npz`. Other arrays are ignored, such as a load.

    Args:
        path: `.npz` with `physical_to_logical [layers, slots]` and optionally `layer_ids [layers]`, the
            numbers `num_logical`, `num_ranks` and `num_nodes`, and `rank_slots [ranks]`.
        max_bytes: bound on the unpacked size of these arrays.

    Returns:
        The logical expert of each slot by layer of the model, `num_logical`, `num_ranks`, `num_nodes` and
        `rank_slots`; None for what the file lacks.

    Raises:
        TraceError: the file is missing, damaged, too large, or an array is not of that kind.
    """
    path = Path(path)
    with opened_zip(path, "a readable .npz (zip) file") as archive:
        arrays = NpzArrays(archive, path, max_bytes)
        table = arrays.integers("physical_to_logical", 2)
        layer_ids = layer_ids_of(arrays) or tuple(range(table.shape[0]))
        if len(layer_ids) != table.shape[0]:
            raise TraceError(f"{path}: {len(layer_ids)} layer_ids for {table.shape[0]} layers")
        check_unique(path, layer_ids)
        num_logical, num_ranks, num_nodes = (
            arrays.number(name) if name in arrays.names else None
            for name in ("num_logical", "num_ranks", "num_nodes")
        )
        rank_slots = None
        if "rank_slots" in arrays.names:
            rank_slots = tuple(arrays.integers("rank_slots", 1).tolist())
    rows = dict(zip(layer_ids, table.tolist(), strict=True))
    return rows, num_logical, num_ranks, num_nodes, rank_slots


def check_unique(path: Path, layer_ids: Sequence[int]) -> None:
    """Raise TraceError if a layer has several rows: a reader would keep one of them."""
    twice = sorted(layer for layer, rows in Counter(layer_ids).items() if rows > 1)
    if twice:
        raise TraceError(f"{path}: layer_ids repeated: {reprlib.repr(twice)}")


class NpzArrays:
    """The arrays of an open archive, each checked before it is unpacked."""

    def __init__(self, archive: zipfile.ZipFile, path: Path, max_bytes: int) -> None:
        self.path = path
        self._archive = archive
        self._max_bytes = self._left = max_bytes
        self.names = frozenset(name[: -len(".npy")] for name in archive.namelist() if name.endswith(".npy"))

    def read(self, name: str) -> np.ndarray[Any, Any]:
        place = f"{self.path}: array {name!r}"
        if name not in self.names:
            raise TraceError(f"{place} is missing; the file has {sorted(self.names)}")
        info = self._archive.getinfo(f"{name}.npy")
        # zipfile never unpacks more than the declared size: its bound is a bound on the work.
        if info.file_size > self._left:
            raise TraceError(
                f"{place} declares {info.file_size} bytes, {self._left} of the {self._max_bytes} "
                "allowed for the file are left"
            )
        self._left -= info.file_size
        try:
            with self._archive.open(info) as stream:
                return _read_array(stream, info.file_size, place)
        except TraceError:
            raise
        except Exception as error:  # numpy's parser of headers raises many types
            raise TraceError(f"{place} is damaged: {error}") from None

    def number(self, name: str) -> int:
        """The single integer of an array."""
        value = self.read(name)
        if value.size != 1 or value.dtype.kind not in "iu":
            raise TraceError(f"{self.path}: {name} is {value.dtype} {value.shape}, not a single integer")
        return int(value.reshape(()))

    def amount(self, name: str) -> float:
        """The single number of an array, 0 or above and finite."""
        value = self.read(name)
        if value.size != 1 or value.dtype.kind not in "iuf" or not 0 <= value.reshape(()) < float("inf"):
            raise TraceError(
                f"{self.path}: {name} is {value.dtype} {value.shape}, not one number of 0 or above"
            )
        return float(value.reshape(()))

    def text(self, name: str) -> str:
        """The text of an array, on one line."""
        value = self.read(name)
        if value.size != 1 or value.dtype.kind != "U":
            raise TraceError(f"{self.path}: {name} is {value.dtype} {value.shape}, not a text")
        return " ".join(str(value.reshape(())).split())

    def integers(self, name: str, dims: int) -> np.ndarray[Any, Any]:
        """An array of integers with `dims` axes, not empty."""
        values = self.read(name)
        if values.ndim != dims or values.size == 0 or values.dtype.kind not in "iu":
            axes = {1: "[ranks]", 2: "[layers, slots]"}[dims]
            raise TraceError(f"{self.path}: {name} is {values.dtype} {values.shape}, not integers {axes}")
        return values


def _read_array(stream: IO[bytes], size: int, place: str) -> np.ndarray[Any, Any]:
    version = npy.read_magic(stream)
    if version == (1, 0):
        shape, fortran, dtype = npy.read_array_header_1_0(stream, max_header_size=_MAX_HEADER)
    elif version == (2, 0):
        shape, fortran, dtype = npy.read_array_header_2_0(stream, max_header_size=_MAX_HEADER)
    else:
        raise TraceError(f"{place} has npy format {version}, not 1.0 or 2.0")
    if dtype.hasobject or dtype.names is not None:
        raise TraceError(f"{place} has dtype {dtype}: only plain numbers and text are read")
    # numpy allocates by the shape of the header, so it must agree with the size.
    expected = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or expected != size - stream.tell():
        raise TraceError(
            f"{place} declares shape {shape} of {dtype} ({expected} bytes) but holds "
            f"{size - stream.tell()} bytes"
        )
    data = stream.read(expected + 1)
    if len(data) != expected:
        raise TraceError(f"{place} ends after {len(data)} of {expected} bytes")
    array: np.ndarray[Any, Any] = np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")
    return array


def layer_ids_of(arrays: NpzArrays) -> tuple[int, ...]:
    """The array `layer_ids`; empty where the file has none."""
    if "layer_ids" not in arrays.names:
        return ()
    ids = arrays.read("layer_ids")
    if ids.ndim != 1 or ids.size == 0 or ids.dtype.kind not in "iu":
        raise TraceError(f"{arrays.path}: layer_ids is {ids.dtype} {ids.shape}, not integers [layers]")
    return tuple(int(item) for item in ids)
