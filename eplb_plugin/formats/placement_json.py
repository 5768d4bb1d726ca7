"""The package's own file of a placement: JSON that says which layers and how many experts it is for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from ..core.errors import TraceError
from ..core.placement import Placement
from ..core.safe_files import MAX_TEXT_BYTES, read_bytes, written_whole
from ..core.topology import Topology
from .schema import first_wrong

__all__ = ["read_placement_json", "write_placement_json"]

_FORMAT: Literal["eplb-plugin placement 1"] = "eplb-plugin placement 1"


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


def read_placement_json(path: str | Path) -> dict[int, list[int]]:
    """The logical expert of each slot, by layer of the model.

    Raises:
        TraceError: the file is not of this kind.
    """
    path = Path(path)
    try:
        content = _File.model_validate_json(read_bytes(path, MAX_TEXT_BYTES))
    except ValidationError as error:
        raise TraceError(f"{path}: {first_wrong(error)}") from None
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
    path: str | Path, placement: Placement, layer_ids: tuple[int, ...], topology: Topology
) -> None:
    """Write a placement; each layer on a line of its own.

    Raises:
        TraceError: the file cannot be written.
    """
    head: dict[str, object] = {
        "format": _FORMAT,
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
