"""The JSON of the public EPLB benchmark: `{"load_history": [{"logical_expert_load": [[...], ...]}, ...]}`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from ..core.errors import TraceError
from ..core.safe_files import MAX_TEXT_BYTES, read_json, written_whole
from ..offline.traces import LoadTrace, as_load

__all__ = ["read_benchmark_json", "write_benchmark_json"]


class _Step(BaseModel):
    model_config = ConfigDict(strict=True)
    logical_expert_load: list[list[int | float]]


class _History(BaseModel):
    """The files of the benchmark have more keys; they are ignored."""

    model_config = ConfigDict(strict=True)
    load_history: list[_Step]


def read_benchmark_json(path: Path, max_bytes: int) -> LoadTrace:
    """Read one step for each entry of `load_history`, all of one shape [layers, experts]."""
    loads = [
        step.logical_expert_load
        for step in read_json(path, _History, min(max_bytes, MAX_TEXT_BYTES)).load_history
    ]
    if not loads:
        raise TraceError(f"{path}: load_history is empty")
    layers, experts = len(loads[0]), len((loads[0] or [[]])[0])
    for step, rows in enumerate(loads):
        place = f"{path}: load_history.{step}.logical_expert_load"
        if len(rows) != layers:
            raise TraceError(f"{place} has {len(rows)} layers, the first one {layers}")
        for layer, row in enumerate(rows):
            if len(row) != experts:
                raise TraceError(f"{place}.{layer} has {len(row)} experts, the first row {experts}")
    try:
        load = np.array(loads)
    except OverflowError:
        raise TraceError(f"{path}: holds a number that is too large for a load") from None
    if load.dtype == object:
        raise TraceError(f"{path}: holds an integer above 64 bits")
    return LoadTrace(as_load(load, str(path)), str(path))


def write_benchmark_json(path: Path, trace: LoadTrace) -> None:
    """Write one entry for each step. The format has no field for `layer_ids`."""
    with written_whole(path) as part, part.open("w", encoding="utf-8") as stream:
        stream.write('{"load_history": [')
        for step, load in enumerate(trace.load):
            stream.write(("," if step else "") + "\n" + json.dumps({"logical_expert_load": load.tolist()}))
        stream.write("\n]}\n")
