"""TensorRT-LLM's files: expert statistics, and the YAML of its MoE load balancer.

Statistics are a folder with `meta_info.json` and one safetensors file per rank. A file has one array for each
iteration and layer, named `{iteration}_{layer}`: the tokens of each expert on that rank. The YAML has the
logical expert of each slot, by layer.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ..core.errors import TraceError
from ..core.placement import Placement
from ..core.safe_files import checked_schema, read_json, read_yaml, written_whole
from ..core.topology import Topology
from ..offline.traces import LoadTrace, as_load

__all__ = [
    "META_FILE",
    "check_statistics_output",
    "read_tensorrt_llm_config",
    "read_tensorrt_llm_statistics",
    "write_tensorrt_llm_config",
    "write_tensorrt_llm_statistics",
]

META_FILE = "meta_info.json"
_MAX_META = 2**20
_LONGEST_KEY = 40
# 100 layers of 1,000 slots are 0.5 MiB. Reading YAML takes a few seconds per MiB.
_MAX_BYTES = 16 * 2**20
_MAX_VALUES = 2**21


class _Meta(BaseModel):
    model_config = ConfigDict(strict=True)
    num_experts: int = Field(ge=1)
    num_experts_per_token: int = Field(ge=1)


def read_tensorrt_llm_statistics(path: Path, max_bytes: int) -> LoadTrace:
    """Read a folder of statistics, summed over the ranks. A step is an iteration, with all layers."""
    meta = read_json(path / META_FILE, _Meta, _MAX_META)
    # rank*_raw.safetensors hold the choices of tokens, not counts.
    files = [file for file in sorted(path.glob("rank*.safetensors")) if not file.stem.endswith("_raw")]
    if not files:
        raise TraceError(f"{path}: no rank*.safetensors in this folder")
    size = sum(file.stat().st_size for file in files)
    if size > max_bytes:
        raise TraceError(f"{path}: its files have {size} bytes, {max_bytes} are allowed")
    counts: dict[tuple[int, int], np.ndarray[Any, Any]] = {}
    for file in files:
        _add_rank(counts, file, meta.num_experts)
    if not counts:
        raise TraceError(f"{path}: no arrays in its rank*.safetensors")
    iterations = sorted({iteration for iteration, _ in counts})
    layers = sorted({layer for _, layer in counts})
    for iteration in iterations:
        for layer in layers:
            if (iteration, layer) not in counts:
                raise TraceError(f"{path}: iteration {iteration} has no layer {layer}, others have")
    load = np.stack([np.stack([counts[iteration, layer] for layer in layers]) for iteration in iterations])
    return LoadTrace(as_load(load, str(path)), str(path), tuple(layers))


def check_statistics_output(path: str | Path) -> None:
    """Check before a long computation that a folder of statistics can be written.

    Raises:
        TraceError: the path is a file, a folder with files in it, or empty.
    """
    path = Path(path)
    if os.path.exists(path) and not os.path.isdir(path):
        raise TraceError(f"{path}: cannot be written: is there already, and no folder")
    if not path.name or (os.path.isdir(path) and os.listdir(path)):
        raise TraceError(f"{path}: cannot be written: the folder exists and is not empty")


def write_tensorrt_llm_statistics(path: Path, trace: LoadTrace, top_k: int) -> None:
    """Write `trace` as the statistics of one rank, into a new or empty folder; `top_k` is at least 1."""
    check_statistics_output(path)
    if top_k < 1:
        raise TraceError(f"{path}: top_k={top_k} is below 1")
    counts = {
        f"{step}_{layer}": np.ascontiguousarray(trace.load[step, index].numpy())
        for step in range(trace.num_steps)
        for index, layer in enumerate(trace.layer_ids)
    }
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.mkdir(parents=True)
        meta = {"num_experts": trace.num_experts, "num_experts_per_token": top_k}
        (part / META_FILE).write_text(json.dumps(meta), encoding="utf-8")
        (part / "rank0.safetensors").write_bytes(save(counts))
        part.rename(path)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        told = error.strerror if isinstance(error, OSError) else None
        raise TraceError(f"{path}: cannot be written: {told or error}") from None


def _add_rank(counts: dict[tuple[int, int], np.ndarray[Any, Any]], file: Path, num_experts: int) -> None:
    try:
        with safe_open(file, framework="np") as tensors:
            for key in tensors.keys():  # noqa: SIM118  # it is no mapping
                iteration, _, layer = key.partition("_")
                if len(key) > _LONGEST_KEY or not (iteration.isdecimal() and layer.isdecimal()):
                    raise TraceError(f"{file}: array {key[:_LONGEST_KEY]!r} is not called iteration_layer")
                count = tensors.get_tensor(key)
                if count.shape != (num_experts,) or count.dtype.kind not in "iuf":
                    raise TraceError(
                        f"{file}: array {key!r} is {count.dtype} {count.shape}, not numbers [{num_experts}]"
                    )
                if not (count >= 0).all():
                    raise TraceError(f"{file}: array {key!r} holds values that are negative or NaN")
                if count.dtype.kind != "f":
                    # The sum over ranks could wrap around to a plausible number.
                    as_load(count, f"{file}: array {key!r}")
                place = int(iteration), int(layer)
                wide = count.astype(np.float64 if count.dtype.kind == "f" else np.int64)
                counts[place] = counts[place] + wide if place in counts else wide
    except (SafetensorError, OSError, TypeError, AttributeError) as error:
        raise TraceError(f"{file}: not a readable safetensors file: {error}") from None


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
