"""Untrusted files of `torch.save`: tensors, numbers, text, lists and dicts are read, nothing else."""

from __future__ import annotations

import pickletools
import zipfile
from pathlib import Path
from typing import Any

import torch

from ..core.errors import TraceError
from ..core.safe_files import opened_zip

__all__ = ["load_torch_file"]

_PROTOCOL = 2
# Globals in the pickle of plain tensors. `weights_only` alone also allows a bytearray of any size.
_STORAGES = ("Byte", "Char", "Short", "Int", "Long", "Half", "Float", "Double")
_ALLOWED = frozenset(
    {"torch._utils _rebuild_tensor_v2", "collections OrderedDict"}
    | {f"torch {name}Storage" for name in _STORAGES}
)


def load_torch_file(path: Path, max_bytes: int) -> Any:
    """Load the content of a file of `torch.save`, tensors on the CPU. Nothing of the file is executed.

    Args:
        path: the file.
        max_bytes: bound on its unpacked size.

    Raises:
        TraceError: the file is missing, damaged, compressed, too large, or holds other Python objects.
    """
    with opened_zip(path, "a file of torch.save (zip)") as archive:
        infos = archive.infolist()
        packed = [info.filename for info in infos if info.compress_type != zipfile.ZIP_STORED]
        size = sum(info.file_size for info in infos)
        pickles = [info for info in infos if info.filename.split("/")[1:] == ["data.pkl"]]
        if size > max_bytes:
            raise TraceError(f"{path}: declares {size} bytes, {max_bytes} are allowed")
        if len(pickles) != 1:
            raise TraceError(f"{path}: not a file of torch.save: no data.pkl in it")
        if packed:
            raise TraceError(f"{path}: {packed[0]} is compressed, which torch.save never does")
        content = archive.read(pickles[0])
    _check_globals(path, content)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises many types
        raise TraceError(f"{path}: is damaged: {_last_line(error)}") from None


def _check_globals(path: Path, content: bytes) -> None:
    try:
        for opcode, argument, _ in pickletools.genops(content):
            if opcode.name == "PROTO" and argument != _PROTOCOL:
                raise TraceError(
                    f"{path}: its pickle is of protocol {argument}, torch.save writes {_PROTOCOL}"
                )
            if opcode.name == "STACK_GLOBAL" or opcode.name.startswith("EXT"):
                raise TraceError(f"{path}: refers to Python objects in a way that torch.save does not")
            if opcode.name in ("GLOBAL", "INST") and argument not in _ALLOWED:
                name = str(argument).replace(" ", ".")
                raise TraceError(f"{path}: holds the Python object {name}: only plain tensors are read")
    except TraceError:
        raise
    except Exception as error:  # pickletools raises ValueError and, on some inputs, others
        raise TraceError(f"{path}: its pickle is damaged: {_last_line(error)}") from None


def _last_line(error: Exception) -> str:
    """The last line of a message without torch's advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if "http" not in line and "weights_only" not in line]
    return told[-1] if told else type(error).__name__
