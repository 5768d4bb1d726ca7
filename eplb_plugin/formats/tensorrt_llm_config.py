"""TensorRT-LLM's YAML file of its MoE load balancer: the logical expert of each slot, by layer."""

from __future__ import annotations

from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict

from ..core.errors import TraceError
from ..core.placement import Placement
from ..core.safe_files import checked_schema, read_yaml, written_whole
from ..core.topology import Topology

__all__ = ["read_tensorrt_llm_config", "write_tensorrt_llm_config"]

# 100 layers of 1,000 slots are 0.5 MiB. Reading YAML takes a few seconds per MiB.
_MAX_BYTES = 16 * 2**20
_MAX_VALUES = 2**21


class _Config(BaseModel):
    """The keys of a placement; other keys of the file are ignored."""

    model_config = ConfigDict(strict=True)
    num_slots: int
    initial_global_assignments: dict[int, list[int]]


def read_tensorrt_llm_config(path: Path) -> dict[int, list[int]]:
    """Read the logical expert of each slot, by layer of the model."""
    content = read_yaml(path, _MAX_BYTES, _MAX_VALUES)
    with checked_schema(path):
        config = _Config.model_validate(content)
    for layer, row in config.initial_global_assignments.items():
        if len(row) != config.num_slots:
            raise TraceError(
                f"{path}: initial_global_assignments.{layer} has {len(row)} slots, "
                f"num_slots={config.num_slots}"
            )
    return config.initial_global_assignments


def write_tensorrt_llm_config(
    path: Path, placement: Placement, layer_ids: tuple[int, ...], topology: Topology
) -> None:
    """Write a placement that TensorRT-LLM keeps unchanged (`layer_updates_per_iter: 0`)."""
    content = {
        "num_slots": placement.num_slots,
        "layer_updates_per_iter": 0,
        "initial_global_assignments": dict(
            zip(layer_ids, placement.physical_to_logical.tolist(), strict=True)
        ),
    }
    with written_whole(path) as part, part.open("w", encoding="utf-8") as stream:
        yaml.safe_dump(content, stream, default_flow_style=None, sort_keys=False, width=2**20)
