"""The package's own JSON file of a placement, with its layers, topology and number of experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from ..core.errors import TraceError
from ..core.placement import Placement
from ..core.safe_files import read_json, written_whole
from ..core.topology import Topology

__all__ = ["read_placement_json", "write_placement_json"]


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


def read_placement_json(path: Path) -> dict[int, list[int]]:
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


def write_placement_json(
    path: Path, placement: Placement, layer_ids: tuple[int, ...], topology: Topology
) -> None:
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
