"""SGLang's `--init-expert-location` file: `{"physical_to_logical_map": [[...], ...]}`, one row per layer."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from ..core.errors import TraceError
from ..core.placement import Placement
from ..core.safe_files import MAX_TEXT_BYTES, first_wrong, read_bytes, written_whole
from ..core.topology import Topology

__all__ = ["read_sglang_location", "write_sglang_location"]


_MAX_SLOTS = 2**26


class _Map(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    physical_to_logical_map: list[list[int]]


def read_sglang_location(path: str | Path) -> dict[int, list[int]]:
    """The logical expert of each slot, by layer of the model.

    Raises:
        TraceError: the file is not of this kind.
    """
    path = Path(path)
    try:
        rows = _Map.model_validate_json(read_bytes(path, MAX_TEXT_BYTES)).physical_to_logical_map
    except ValidationError as error:
        raise TraceError(f"{path}: {first_wrong(error)}") from None
    return dict(enumerate(rows))


def write_sglang_location(
    path: str | Path, placement: Placement, layer_ids: tuple[int, ...], topology: Topology
) -> None:
    """Write a placement for SGLang, which wants a row for dense layers too: they get the one it starts from.

    Raises:
        TraceError: the file cannot be written.
    """
    default = Placement.default(1, placement.num_logical, placement.num_slots).physical_to_logical
    size = (layer_ids[-1] + 1) * placement.num_slots
    if size > _MAX_SLOTS:
        raise TraceError(f"{path}: layers up to {layer_ids[-1]} would take {size} slots")
    rows: torch.Tensor = default.repeat(layer_ids[-1] + 1, 1)
    rows[list(layer_ids)] = placement.physical_to_logical.cpu()
    with written_whole(path) as part:
        part.write_text(json.dumps({"physical_to_logical_map": rows.tolist()}) + "\n", encoding="utf-8")
