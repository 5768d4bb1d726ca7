"""The package's own `.npz` traces. Files may come from strangers: nothing is unpickled, sizes are bounded."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy

from ..core.errors import TraceError
from ..core.safe_files import written_whole
from ..offline.traces import LoadTrace, TokenTrace, as_load

__all__ = ["MAX_BYTES", "NpzReader", "read_npz_trace", "save_load_trace"]

MAX_BYTES = 2 * 2**30
"""Default bound on the unpacked size of all arrays read from one file, in bytes."""

_MAX_HEADER = 4096
# What zipfile raises for files that are no archives, damaged ones or exotic ones.
_NO_ARCHIVE = (zipfile.BadZipFile, EOFError, OSError, NotImplementedError, ValueError)


class NpzReader:
    """An open `.npz` file whose arrays are read one by one, each checked before it is unpacked.

    Args:
        path: the file.
        max_bytes: bound on the unpacked bytes of all arrays that are read.

    Raises:
        TraceError: the file is missing, unreadable or not a zip archive.
    """

    def __init__(self, path: str | Path, max_bytes: int = MAX_BYTES) -> None:
        self.path = Path(path)
        self._max_bytes = self._left = max_bytes
        try:
            self._zip = zipfile.ZipFile(self.path)
        except FileNotFoundError:
            raise TraceError(f"{self.path}: no such file") from None
        except _NO_ARCHIVE as error:
            raise TraceError(f"{self.path}: not a readable .npz (zip) file: {error}") from None
        self.names = frozenset(name[: -len(".npy")] for name in self._zip.namelist() if name.endswith(".npy"))

    def __enter__(self) -> NpzReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._zip.close()

    def read(self, name: str) -> np.ndarray[Any, Any]:
        """The array `name`.

        Raises:
            TraceError: it is missing, damaged, holds Python objects, or is larger than it may be.
        """
        place = f"{self.path}: array {name!r}"
        if name not in self.names:
            raise TraceError(f"{place} is missing; the file has {sorted(self.names)}")
        info = self._zip.getinfo(f"{name}.npy")
        # zipfile never unpacks more than the declared size, so bounding that bounds the work.
        if info.file_size > self._left:
            raise TraceError(
                f"{place} declares {info.file_size} bytes, {self._left} of the {self._max_bytes} "
                "allowed for the file are left"
            )
        self._left -= info.file_size
        try:
            with self._zip.open(info) as stream:
                return self._read_array(stream, info.file_size, place)
        except TraceError:
            raise
        except Exception as error:  # numpy's parser of headers fails in many ways
            raise TraceError(f"{place} is damaged: {error}") from None

    @staticmethod
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
        # The header's shape decides how much numpy allocates, so it must agree with the size.
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


def read_npz_trace(path: str | Path, max_bytes: int = MAX_BYTES) -> LoadTrace | TokenTrace:
    """Read an `.npz` trace; which kind it is follows from the arrays it has.

    Args:
        path: `.npz` with `load [steps, layers, experts]` and perhaps `layer_ids [layers]`, or with
            `topk_ids [tokens, layers, top_k]`, `request [tokens]`, `category [requests]` and `num_experts`.
            Other arrays are not looked at.
        max_bytes: bound on the unpacked size.

    Raises:
        TraceError: the file is damaged, too large, of neither kind, or holds values that make no sense.
    """
    with NpzReader(path, max_bytes) as reader:
        name = str(reader.path)
        if ("load" in reader.names) == ("topk_ids" in reader.names):
            raise TraceError(
                f"{name}: expected either an array 'load' or an array 'topk_ids'; the file has "
                f"{sorted(reader.names)}"
            )
        if "load" in reader.names:
            return LoadTrace(as_load(reader.read("load"), name), name, _layer_ids(reader))
        num_experts = reader.read("num_experts")
        if num_experts.size != 1 or num_experts.dtype.kind not in "iu":
            raise TraceError(
                f"{name}: num_experts is {num_experts.dtype} {num_experts.shape}, not a single integer"
            )
        return TokenTrace(
            reader.read("topk_ids"),
            reader.read("request"),
            reader.read("category"),
            int(num_experts.reshape(())),
            name,
        )


def save_load_trace(path: str | Path, trace: LoadTrace) -> None:
    """Write `trace` as a compressed `.npz`; the file appears whole or not at all.

    Raises:
        TraceError: the file cannot be written.
    """
    with written_whole(path) as part, part.open("wb") as stream:
        np.savez_compressed(stream, load=trace.load.numpy(), layer_ids=np.array(trace.layer_ids, np.int64))


def _layer_ids(reader: NpzReader) -> tuple[int, ...]:
    if "layer_ids" not in reader.names:
        return ()
    ids = reader.read("layer_ids")
    if ids.ndim != 1 or ids.size == 0 or ids.dtype.kind not in "iu":
        raise TraceError(f"{reader.path}: layer_ids is {ids.dtype} {ids.shape}, not integers [layers]")
    return tuple(int(item) for item in ids)
