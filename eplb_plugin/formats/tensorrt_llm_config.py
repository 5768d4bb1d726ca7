"""TensorRT-LLM's MoE load balancer file (YAML), which assigns experts to slots by layer of the model."""

from __future__ import annotations

from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from ..core.errors import TraceError
from ..core.placement import Placement
from ..core.safe_files import first_wrong, read_yaml, written_whole
from ..core.topology import Topology

__all__ = ["read_tensorrt_llm_config", "write_tensorrt_llm_config"]

# A hundred layers of a thousand slots are half a MiB; reading YAML takes a few seconds per MiB.
_MAX_BYTES = 16 * 2**20
_MAX_VALUES = 2**21


class _Config(BaseModel):
    """The keys that a placement needs; the file may have others."""

    model_config = ConfigDict(strict=True)
    num_slots: int
    initial_global_assignments: dict[int, list[int]]


def read_tensorrt_llm_config(path: str | Path) -> dict[int, list[int]]:
    """The logical expert of each slot, by layer of the model.

    Raises:
        TraceError: the file is not of this kind.
    """
    path = Path(path)
    try:
        config = _Config.model_validate(read_yaml(path, _MAX_BYTES, _MAX_VALUES))
    except ValidationError as error:
        raise TraceError(f"{path}: {first_wrong(error)}") from None
    for layer, row in config.initial_global_assignments.items():
        if len(row) != config.num_slots:
            raise TraceError(
                f"{path}: initial_global_assignments.{layer} has {len(row)} slots, "
                f"num_slots={config.num_slots}"
            )
    return config.initial_global_assignments


def write_tensorrt_llm_config(
    path: str | Path, placement: Placement, layer_ids: tuple[int, ...], topology: Topology
) -> None:
    """Write a placement that TensorRT-LLM keeps as it is (`layer_updates_per_iter` 0).

    Raises:
        TraceError: the file cannot be written.
    """
    content = {
        "num_slots": placement.num_slots,
        "layer_updates_per_iter": 0,
        "initial_global_assignments": dict(
            zip(layer_ids, placement.physical_to_logical.tolist(), strict=True)
        ),
    }
    with written_whole(path) as part, part.open("w", encoding="utf-8") as stream:
        yaml.safe_dump(content, stream, default_flow_style=None, sort_keys=False, width=2**20)
