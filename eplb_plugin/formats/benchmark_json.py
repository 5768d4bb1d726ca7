"""The JSON of the public EPLB benchmark: `{"load_history": [{"logical_expert_load": [[...], ...]}, ...]}`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from ..core.errors import TraceError
from ..core.safe_files import MAX_TEXT_BYTES, first_wrong, read_bytes, written_whole
from ..offline.traces import LoadTrace, as_load

__all__ = ["read_benchmark_json", "write_benchmark_json"]


class _Step(BaseModel):
    model_config = ConfigDict(strict=True)
    logical_expert_load: list[list[int | float]]


class _History(BaseModel):
    """Other keys, of which the benchmark's files have a few, are not looked at."""

    model_config = ConfigDict(strict=True)
    load_history: list[_Step]


def read_benchmark_json(path: str | Path, max_bytes: int = MAX_TEXT_BYTES) -> LoadTrace:
    """Read one load per entry of `load_history`: [layers, experts] each, all of one shape.

    Raises:
        TraceError: the file is too large, not of this kind, or holds values that make no sense.
    """
    path = Path(path)
    try:
        history = _History.model_validate_json(read_bytes(path, min(max_bytes, MAX_TEXT_BYTES))).load_history
    except ValidationError as error:
        raise TraceError(f"{path}: {first_wrong(error)}") from None
    if not history:
        raise TraceError(f"{path}: load_history is empty")
    layers, experts = len(history[0].logical_expert_load), len((history[0].logical_expert_load or [[]])[0])
    for step, entry in enumerate(history):
        place = f"{path}: load_history.{step}.logical_expert_load"
        if len(entry.logical_expert_load) != layers:
            raise TraceError(f"{place} has {len(entry.logical_expert_load)} layers, the first one {layers}")
        for layer, row in enumerate(entry.logical_expert_load):
            if len(row) != experts:
                raise TraceError(f"{place}.{layer} has {len(row)} experts, the first row {experts}")
    try:
        load = np.array([entry.logical_expert_load for entry in history])
    except OverflowError:
        raise TraceError(f"{path}: holds a number that is too large for a load") from None
    if load.dtype == object:
        raise TraceError(f"{path}: holds an integer above 64 bits")
    return LoadTrace(as_load(load, str(path)), str(path))


def write_benchmark_json(path: str | Path, trace: LoadTrace) -> None:
    """Write one entry per step. Which layers of the model the rows are of has no place in this format.

    Raises:
        TraceError: the file cannot be written.
    """
    with written_whole(path) as part, part.open("w", encoding="utf-8") as stream:
        stream.write('{"load_history": [')
        for step, load in enumerate(trace.load):
            stream.write(("," if step else "") + "\n" + json.dumps({"logical_expert_load": load.tolist()}))
        stream.write("\n]}\n")
