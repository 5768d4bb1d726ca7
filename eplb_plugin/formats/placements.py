"""Registry of the formats of placements, the package's own JSON file, and the reading of them all."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict

from ..core.errors import PlacementError, TopologyError, TraceError
from ..core.placement import Placement
from ..core.safe_files import MAX_TEXT_BYTES, read_bytes, read_json, written_whole
from ..core.topology import Topology
from .npz import check_unique, read_npz_placement
from .sglang import read_sglang_dump_placement, read_sglang_location, write_sglang_location
from .tensorrt_llm import read_tensorrt_llm_config, write_tensorrt_llm_config

__all__ = ["PLACEMENT_FORMATS", "PlacementFile", "read_placement", "read_placement_file", "write_placement"]


class PlacementFile(NamedTuple):
    """A placement with what else its file says; None where a format has no room for it.

    Attributes:
        placement: rows of `layer_ids`.
        layer_ids: layer of the model of each row, rising.
        num_ranks: ranks that the slots spread over.
        num_nodes: nodes that the ranks spread over.
        rank_slots: slots of each rank, where ranks differ in slots.
    """

    placement: Placement
    layer_ids: tuple[int, ...]
    num_ranks: int | None
    num_nodes: int | None
    rank_slots: tuple[int, ...] | None


@dataclass(frozen=True)
class _Content:
    """What a file says, as it stands there: `rows` by layer of the model, the logical expert of each slot."""

    rows: Mapping[int, list[int]]
    num_logical: int | None = None
    num_ranks: int | None = None
    num_nodes: int | None = None
    rank_slots: tuple[int, ...] | None = None


class _File(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    format: Literal["eplb-plugin placement 1"]
    num_logical: int
    num_ranks: int
    num_nodes: int
    num_groups: int
    rank_slots: list[int] | None = None
    layer_ids: list[int]
    physical_to_logical: list[list[int]]


def _read_json(path: Path) -> _Content:
    content = read_json(path, _File)
    if len(content.layer_ids) != len(content.physical_to_logical):
        raise TraceError(
            f"{path}: {len(content.layer_ids)} layer_ids for {len(content.physical_to_logical)} rows"
        )
    check_unique(path, content.layer_ids)
    for layer, row in zip(content.layer_ids, content.physical_to_logical, strict=True):
        if content.rank_slots is not None and sum(content.rank_slots) != len(row):
            raise TraceError(
                f"{path}: layer {layer} has {len(row)} slots, rank_slots {sum(content.rank_slots)} in all"
            )
    return _Content(
        dict(zip(content.layer_ids, content.physical_to_logical, strict=True)),
        content.num_logical,
        content.num_ranks,
        content.num_nodes,
        None if content.rank_slots is None else tuple(content.rank_slots),
    )


def _write_json(path: Path, placement: Placement, layer_ids: tuple[int, ...], topology: Topology) -> None:
    """Write a placement, one line for each layer."""
    head: dict[str, object] = {
        "format": "eplb-plugin placement 1",
        "num_logical": placement.num_logical,
        "num_ranks": topology.num_ranks,
        "num_nodes": topology.num_nodes,
        "num_groups": topology.num_groups,
        "layer_ids": list(layer_ids),
    }
    if topology.rank_slots is not None:
        head["rank_slots"] = list(topology.rank_slots)
    rows = ",\n  ".join(json.dumps(row) for row in placement.physical_to_logical.tolist())
    text = json.dumps(head)[:-1] + f',\n "physical_to_logical": [\n  {rows}\n]}}\n'
    with written_whole(path) as part:
        part.write_text(text, encoding="utf-8")


PLACEMENT_FORMATS: Mapping[str, Callable[[Path, Placement, tuple[int, ...], Topology], None]] = (
    MappingProxyType(
        {"json": _write_json, "sglang": write_sglang_location, "tensorrt-llm": write_tensorrt_llm_config}
    )
)
"""Writers by name of the format: `write(path, placement, layer_ids, topology)`. They raise TraceError."""

_MOST_EXPERTS = 2**20
"""Largest `num_logical` of a file, as of `Topology`: a mistyped number must not become an allocation."""

# Formats with empty slots, and with ranks that differ in slots; engines can load neither.
_EMPTY_SLOTS = _UNEVEN_RANKS = frozenset({"json"})


def write_placement(
    path: str | Path, placement: Placement, layer_ids: tuple[int, ...], topology: Topology, form: str
) -> None:
    """Write `placement`; row `i` is layer `layer_ids[i]` of the model.

    Raises:
        TraceError: unknown format, or the file cannot be written.
        TopologyError: ranks differ in slots, and the format is not `json`.
        PlacementError: a slot is empty, and the format is not `json`.
    """
    if form not in PLACEMENT_FORMATS:
        raise TraceError(f"no format {form!r} of placements; there are {', '.join(PLACEMENT_FORMATS)}")
    if not topology.is_even and form not in _UNEVEN_RANKS:
        raise TopologyError(
            f"the format {form!r} has no room for rank_slots={topology.rank_slots}; "
            f"{', '.join(sorted(_UNEVEN_RANKS))} has"
        )
    if placement.has_empty_slots and form not in _EMPTY_SLOTS:
        layer, slot = (placement.physical_to_logical < 0).nonzero()[0].tolist()
        raise PlacementError(
            f"layer {layer}, slot {slot} is empty, which the format {form!r} cannot say; "
            f"{', '.join(sorted(_EMPTY_SLOTS))} can"
        )
    PLACEMENT_FORMATS[form](Path(path), placement, layer_ids, topology)


def read_placement(path: str | Path, num_logical: int, layer_ids: tuple[int, ...]) -> Placement:
    """Read a placement of any format.

    Args:
        path: the file.
        num_logical: logical experts per layer.
        layer_ids: layers of the model to read.

    Raises:
        TraceError: the file is missing, of no known format, or lacks a layer.
        PlacementError: the rows are no placement of `num_logical` experts.
    """
    path = Path(path)
    return Placement(_table(path, _read(path).rows, layer_ids), num_logical)


def read_placement_file(
    path: str | Path, num_logical: int | None = None, layer_ids: tuple[int, ...] | None = None
) -> PlacementFile:
    """Read a placement of any format, and what else the file says.

    Args:
        path: the file.
        num_logical: logical experts per layer; None: as the file says, or one more than its largest id.
        layer_ids: layers of the model to read; None: all of the file.

    Raises:
        TraceError: the file is missing, of no known format, or lacks a layer.
        PlacementError: the rows are no placement of that many experts, or the file says another number.
    """
    path = Path(path)
    content = _read(path)
    if content.num_logical is not None and content.num_logical > _MOST_EXPERTS:
        raise PlacementError(f"{path}: num_logical is above {_MOST_EXPERTS}")
    if num_logical is not None and content.num_logical not in (None, num_logical):
        raise PlacementError(f"{path}: is of {content.num_logical} experts, not of {num_logical}")
    layer_ids = tuple(sorted(content.rows)) if layer_ids is None else layer_ids
    if not layer_ids:
        raise TraceError(f"{path}: has no layers")
    table = _table(path, content.rows, layer_ids)
    if not table.numel():
        raise TraceError(f"{path}: has no slots")
    if num_logical is None:
        num_logical = int(table.max()) + 1 if content.num_logical is None else content.num_logical
    try:
        placement = Placement(table, num_logical)
    except PlacementError as error:
        raise PlacementError(f"{path}: {error}") from None
    return PlacementFile(placement, layer_ids, content.num_ranks, content.num_nodes, content.rank_slots)


def _read(path: Path) -> _Content:
    """Read a file of any format.

    Raises:
        TraceError: the file is missing, of no known format, or has a layer twice or below 0.
    """
    content = _read_any(path)
    below = sorted(layer for layer in content.rows if layer < 0)
    if below:
        raise TraceError(f"{path}: layer_ids below 0: {reprlib.repr(below)}")
    return content


def _read_any(path: Path) -> _Content:
    """Read a file of any format. Suffixes tell TensorRT-LLM's YAML, `.npz` and `.pt`; keys tell JSON."""
    suffix = path.suffix.lower()
    if suffix in (".yaml", ".yml"):
        return _Content(read_tensorrt_llm_config(path))
    if suffix == ".npz":
        return _Content(*read_npz_placement(path))
    if suffix == ".pt":
        return _Content(read_sglang_dump_placement(path))
    text = read_bytes(path, MAX_TEXT_BYTES)
    try:
        keys = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TraceError(f"{path}: neither JSON nor named .yaml, .npz or .pt: {error}") from None
    ours = not (isinstance(keys, dict) and "physical_to_logical_map" in keys)
    return _read_json(path) if ours else _Content(read_sglang_location(path))


def _table(path: Path, rows: Mapping[int, list[int]], layer_ids: tuple[int, ...]) -> torch.Tensor:
    """The rows of `layer_ids`, int64 [layers, slots]."""
    missing = [layer for layer in layer_ids if layer not in rows]
    if missing:
        raise TraceError(f"{path}: has no layer {missing[0]}; it has {_ranges(sorted(rows))}")
    slots = len(rows[layer_ids[0]])
    for layer in layer_ids:
        if len(rows[layer]) != slots:
            raise TraceError(f"{path}: layer {layer} has {len(rows[layer])} slots, others {slots}")
    for layer in layer_ids:
        wide = next((item for item in rows[layer] if item.bit_length() >= 64), None)
        if wide is not None:
            raise TraceError(f"{path}: layer {layer} holds an expert of {wide.bit_length()} bits")
    return torch.tensor([rows[layer] for layer in layer_ids], dtype=torch.int64)


def _ranges(layers: list[int]) -> str:
    return f"{layers[0]} to {layers[-1]} ({len(layers)} of them)" if layers else "none"
