"""SGLang's files: dumps of its expert distribution recorder (`.pt`), and JSON for `--init-expert-location`.

Modes `stat` and `stat_approx` of the recorder write one file with `logical_count [steps, layers, logical]`.
Modes `per_pass` and `per_token` write one file per rank, with one record for each forward pass. A record
counts the tokens of physical experts; in `per_token` it also has the choices of each token, which are ignored
here. The JSON is `{"physical_to_logical_map": [[...], ...]}`, by layer.
"""

from __future__ import annotations

import json
import math
import os
import pickletools
import reprlib
import zipfile
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from ..core.errors import TraceError
from ..core.placement import Placement
from ..core.safe_files import MAX_BYTES, opened_zip, read_json, written_whole
from ..core.topology import Topology
from ..offline.traces import MAX_COUNT, LoadTrace, as_load

__all__ = [
    "read_sglang_dump",
    "read_sglang_dump_placement",
    "read_sglang_location",
    "write_sglang_dump",
    "write_sglang_location",
]

_PROTOCOL = 2  # of the pickles that torch.save writes
# Globals in the pickle of plain tensors. `weights_only` alone also allows a bytearray of any size.
_STORAGES = ("Byte", "Char", "Short", "Int", "Long", "Half", "Float", "Double")
_ALLOWED = frozenset(
    {"torch._utils _rebuild_tensor_v2", "collections OrderedDict"}
    | {f"torch {name}Storage" for name in _STORAGES}
)
_MAX_SLOTS = 2**26  # over all layers
_MAX_LISTED = 2**23  # the same, as lists of Python


def read_sglang_dump(path: Path, max_bytes: int) -> LoadTrace:
    """Read one `.pt` file, or a folder with one file per rank of one recording, which are summed.

    Steps without tokens are dropped: unused entries of the recorder's buffer look like that. The rows are
    all layers of the model; dense layers have no load.
    """
    files = sorted(path.glob("*.pt")) if os.path.isdir(path) else [path]
    if not files:
        raise TraceError(f"{path}: no .pt files in this folder")
    passes: dict[int, torch.Tensor] = {}
    seen: dict[tuple[int, int], Path] = {}
    for file in files:
        content = _load_torch_file(file, max_bytes)
        max_bytes -= file.stat().st_size
        if not isinstance(content, dict):
            raise TraceError(f"{file}: holds a {type(content).__name__}, not a dict")
        if "logical_count" in content:
            if len(files) > 1:
                raise TraceError(f"{file}: is a dump of all ranks; read the {len(files)} files one by one")
            return LoadTrace(_without_idle(_count(content["logical_count"], file), file), str(path))
        _add_records(content, file, passes, seen)
    load = torch.stack([passes[key] for key in sorted(passes)]).long()
    return LoadTrace(_without_idle(load, path), str(path))


def write_sglang_dump(path: Path, trace: LoadTrace) -> None:
    """Write `trace` as a dump of mode `stat`; rows of dense layers are zeros."""
    load = trace.load
    if trace.layer_ids != tuple(range(trace.num_layers)):
        shape = (trace.num_steps, trace.layer_ids[-1] + 1, trace.num_experts)
        size = math.prod(shape) * load.element_size()
        if size > MAX_BYTES:
            raise TraceError(f"{path}: layers up to {trace.layer_ids[-1]} would take {size} bytes")
        full = load.new_zeros(shape)
        full[:, list(trace.layer_ids)] = load
        load = full
    content = {"rank": 0, "logical_count": load.contiguous(), "average_utilization_rate_over_window": None}
    with written_whole(path) as part, part.open("wb") as stream:
        torch.save(content, stream)


def _count(count: Any, file: Path) -> torch.Tensor:
    """Check `logical_count`: [steps, layers, logical], or [layers, logical] for a single step."""
    count = _plain(count, f"{file}: logical_count")
    if count.dim() == 2:
        count = count.unsqueeze(0)
    if count.dim() != 3 or count.numel() == 0:
        raise TraceError(
            f"{file}: logical_count has shape {tuple(count.shape)}, not [steps, layers, logical]"
        )
    # LoadTrace checks the values.
    return as_load(count.numpy(), str(file))


def _add_records(
    content: dict[Any, Any], file: Path, passes: dict[int, torch.Tensor], seen: dict[tuple[int, int], Path]
) -> None:
    """Add the records of one rank to `passes`, the load [layers, logical] by number of the forward pass.

    `seen` is the file of each (forward pass, rank).
    """
    for key, kind in (("records", list), ("last_physical_to_logical_map", torch.Tensor)):
        if not isinstance(content.get(key), kind):
            raise TraceError(
                f"{file}: neither logical_count nor {key} ({kind.__name__}); it has "
                f"{reprlib.repr(sorted(map(str, content)))}"
            )
    placement = _physical_to_logical(content, "last_physical_to_logical_map", file)
    low, high = int(placement.min()), int(placement.max())
    if low < 0 or high >= placement.shape[1]:
        raise TraceError(
            f"{file}: last_physical_to_logical_map names the expert {low if low < 0 else high}, "
            f"outside 0..{placement.shape[1] - 1}"
        )
    if not content["records"]:
        raise TraceError(f"{file}: records is empty")
    for index, record in enumerate(content["records"]):
        place = f"{file}: records[{index}]"
        number, rank, count = _record(record, placement, place)
        if (number, rank) in seen:
            raise TraceError(
                f"{place}: rank {rank} recorded forward pass {number} in {seen[number, rank]} too; keep the "
                "dumps of one recording in a folder of their own"
            )
        seen[number, rank] = file
        load = torch.zeros(placement.shape[0], high + 1, dtype=torch.float64)
        load.scatter_add_(1, placement.long(), count.double())
        known = passes.get(number, next(iter(passes.values()), load))
        if known.shape != load.shape:
            raise TraceError(
                f"{place}: {load.shape[0]} layers of {load.shape[1]} experts, other ranks have "
                f"{known.shape[0]} of {known.shape[1]}"
            )
        total = passes[number] + load if number in passes else load
        if float(total.max()) > MAX_COUNT:
            raise TraceError(f"{place}: an expert got {float(total.max()):g} tokens, above {MAX_COUNT}")
        passes[number] = total


def _physical_to_logical(content: dict[Any, Any], key: str, file: Path) -> torch.Tensor:
    """The map under `key`: integer [layers, physical]."""
    placement = _plain(content[key], f"{file}: {key}")
    if placement.dim() != 2 or placement.numel() == 0 or placement.is_floating_point():
        kind = f"{placement.dtype} {tuple(placement.shape)}"
        raise TraceError(f"{file}: {key} is {kind}, not integers [layers, physical]")
    return placement


def _record(record: Any, placement: torch.Tensor, place: str) -> tuple[int, int, torch.Tensor]:
    """Number of the forward pass, rank, and integer [layers, physical] tokens of one record."""
    if not isinstance(record, dict):
        raise TraceError(f"{place} is a {type(record).__name__}, not a dict")
    number, rank = record.get("forward_pass_id"), record.get("rank")
    if type(number) is not int or type(rank) is not int:
        raise TraceError(f"{place}: forward_pass_id={number!r} and rank={rank!r} are not both integers")
    count = _plain(record.get("global_physical_count"), f"{place}: global_physical_count")
    if count.shape != placement.shape or count.is_floating_point():
        raise TraceError(
            f"{place}: global_physical_count is {count.dtype} {tuple(count.shape)}, not integers "
            f"{tuple(placement.shape)} as last_physical_to_logical_map"
        )
    if int(count.min()) < 0:
        layer, slot = (int(x) for x in (count < 0).nonzero()[0])
        raise TraceError(f"{place}: global_physical_count[{layer}, {slot}]={int(count[layer, slot])}")
    return number, rank, count


def _plain(value: Any, place: str) -> torch.Tensor:
    """Check that `value` is a tensor of numbers whose storage holds all of its elements."""
    if not isinstance(value, torch.Tensor):
        raise TraceError(f"{place} is a {type(value).__name__}, not a tensor")
    if value.is_complex() or value.dtype == torch.bool:
        raise TraceError(f"{place} has dtype {value.dtype}, not an integer or a float")
    # With a stride of 0, a small file declares a huge tensor.
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise TraceError(f"{place} declares shape {tuple(value.shape)}, more than it holds")
    return value.detach().resolve_neg()


def _without_idle(load: torch.Tensor, file: Path) -> torch.Tensor:
    busy = (load != 0).flatten(1).any(1)
    if not bool(busy.any()):
        raise TraceError(f"{file}: none of its {load.shape[0]} steps has any tokens")
    return load[busy]


def _load_torch_file(path: Path, max_bytes: int) -> Any:
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


def read_sglang_dump_placement(path: Path) -> dict[int, list[int]]:
    """Read the logical expert of each slot, by layer of the model, from a file of `torch.save`.

    Dumps of the modes `per_pass` and `per_token` hold the last map; `--init-expert-location` reads files with
    `physical_to_logical_map`.
    """
    content = _load_torch_file(path, MAX_BYTES)
    keys = ("physical_to_logical_map", "last_physical_to_logical_map")
    for key in keys:
        if isinstance(content, dict) and key in content:
            placement = _physical_to_logical(content, key, path)
            if placement.numel() > _MAX_LISTED:
                raise TraceError(f"{path}: {key} has {placement.numel()} slots, {_MAX_LISTED} are allowed")
            return dict(enumerate(placement.tolist()))
    known = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
    raise TraceError(f"{path}: has none of the keys {', '.join(keys)}; it has {reprlib.repr(known)}")


class _Map(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    physical_to_logical_map: list[list[int]]


def read_sglang_location(path: Path) -> dict[int, list[int]]:
    """Read the logical expert of each slot, by layer of the model."""
    return dict(enumerate(read_json(path, _Map).physical_to_logical_map))


def write_sglang_location(
    path: Path, placement: Placement, layer_ids: tuple[int, ...], topology: Topology
) -> None:
    """Write a placement. SGLang wants a row for dense layers too: they get SGLang's default placement."""
    default = Placement.default(1, placement.num_logical, placement.num_slots).physical_to_logical
    size = (layer_ids[-1] + 1) * placement.num_slots
    if size > _MAX_SLOTS:
        raise TraceError(f"{path}: layers up to {layer_ids[-1]} would take {size} slots")
    rows: torch.Tensor = default.repeat(layer_ids[-1] + 1, 1)
    rows[list(layer_ids)] = placement.physical_to_logical.cpu()
    with written_whole(path) as part:
        part.write_text(json.dumps({"physical_to_logical_map": rows.tolist()}) + "\n", encoding="utf-8")
