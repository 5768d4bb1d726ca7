"""SGLang's JSON file for `--init-expert-location`: `{"physical_to_logical_map": [[...], ...]}`, by layer."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict

from ..core.errors import TraceError
from ..core.placement import Placement
from ..core.safe_files import read_json, written_whole
from ..core.topology import Topology

__all__ = ["read_sglang_location", "write_sglang_location"]

_MAX_SLOTS = 2**26  # over all layers


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
