"""Registry of the formats of placements, and the package's own JSON file of a placement."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict

from ..core.errors import PlacementError, TopologyError, TraceError
from ..core.placement import Placement
from ..core.safe_files import MAX_TEXT_BYTES, read_bytes, read_json, written_whole
from ..core.topology import Topology
from .sglang import read_sglang_location, write_sglang_location
from .tensorrt_llm import read_tensorrt_llm_config, write_tensorrt_llm_config

__all__ = ["PLACEMENT_FORMATS", "read_placement", "write_placement"]


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


def _read_json(path: Path) -> dict[int, list[int]]:
    """Read the logical expert of each slot, by layer of the model."""
    content = read_json(path, _File)
    if len(content.layer_ids) != len(content.physical_to_logical):
        raise TraceError(
            f"{path}: {len(content.layer_ids)} layer_ids for {len(content.physical_to_logical)} rows"
        )
    for layer, row in zip(content.layer_ids, content.physical_to_logical, strict=True):
        if content.rank_slots is not None and sum(content.rank_slots) != len(row):
            raise TraceError(
                f"{path}: layer {layer} has {len(row)} slots, rank_slots {sum(content.rank_slots)} in all"
            )
    return dict(zip(content.layer_ids, content.physical_to_logical, strict=True))


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
    """Read a placement of any format: YAML is TensorRT-LLM's, and the keys tell the two JSON formats apart.

    Args:
        path: the file.
        num_logical: logical experts per layer.
        layer_ids: layers of the model to read.

    Raises:
        TraceError: the file is missing, of no known format, or lacks a layer.
        PlacementError: the rows are no placement of `num_logical` experts.
    """
    path = Path(path)
    if path.suffix.lower() in (".yaml", ".yml"):
        rows = read_tensorrt_llm_config(path)
    else:
        try:
            keys = json.loads(read_bytes(path, MAX_TEXT_BYTES))
        except (ValueError, RecursionError) as error:
            raise TraceError(f"{path}: neither JSON nor named .yaml: {error}") from None
        ours = not (isinstance(keys, dict) and "physical_to_logical_map" in keys)
        rows = _read_json(path) if ours else read_sglang_location(path)
    missing = [layer for layer in layer_ids if layer not in rows]
    if missing:
        raise TraceError(f"{path}: has no layer {missing[0]}; it has {_ranges(sorted(rows))}")
    slots = len(rows[layer_ids[0]])
    for layer in layer_ids:
        if len(rows[layer]) != slots:
            raise TraceError(f"{path}: layer {layer} has {len(rows[layer])} slots, others {slots}")
    try:
        table = torch.tensor([rows[layer] for layer in layer_ids], dtype=torch.int64)
    except (RuntimeError, OverflowError, ValueError) as error:  # ids beyond 64 bits
        raise TraceError(f"{path}: {error}") from None
    return Placement(table, num_logical)


def _ranges(layers: list[int]) -> str:
    return f"{layers[0]} to {layers[-1]} ({len(layers)} of them)" if layers else "none"
