"""CSV tables of loads for spreadsheets: one row for each step and layer, one column for each expert."""

from __future__ import annotations

import csv
import io
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

import numpy as np

from ..core.errors import TraceError
from ..core.safe_files import MAX_TEXT_BYTES, read_bytes, written_whole
from ..offline.traces import LoadTrace, as_load

__all__ = ["read_csv", "write_csv"]

_LONGEST_CELL = 64  # characters; NumPy pads every cell of a row to the longest one

_Row: TypeAlias = "np.ndarray[tuple[int], np.dtype[np.float64 | np.int64]]"


def read_csv(path: Path, max_bytes: int) -> LoadTrace:
    """Read a table with the columns `step, layer, expert_0, expert_1, ...`.

    Rows are sorted by step, then layer, and all steps have the same layers. The load is float64 if any
    value has a decimal point, int64 otherwise. Errors name the line.
    """
    try:
        text = read_bytes(path, min(max_bytes, MAX_TEXT_BYTES)).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TraceError(f"{path}: not text in UTF-8: {error}") from None
    reader = csv.reader(io.StringIO(text))
    try:
        header = next(reader, [])
        experts = len(header) - 2
        if experts < 1 or header != _header(experts):
            raise TraceError(f"{path}: line 1 is not the header step,layer,expert_0,expert_1,...")
        steps: list[int] = []
        layers: list[int] = []
        rows: list[_Row] = []
        for cells in reader:
            place = f"{path}: line {reader.line_num}"
            if len(cells) != len(header):
                raise TraceError(f"{place} has {len(cells)} cells, the header {len(header)}")
            steps.append(_integer(cells[0], f"{place}, step"))
            layers.append(_integer(cells[1], f"{place}, layer"))
            rows.append(_row(cells[2:], place))
    except csv.Error as error:
        raise TraceError(f"{path}: line {reader.line_num}: {error}") from None
    if not rows:
        raise TraceError(f"{path}: has a header and no rows")
    num_layers = next((index for index, step in enumerate(steps) if step != steps[0]), len(steps))
    _check_order(path, steps, layers, num_layers)
    load = np.stack(rows).reshape(-1, num_layers, experts)
    return LoadTrace(as_load(load, str(path)), str(path), tuple(layers[:num_layers]))


def write_csv(path: Path, trace: LoadTrace) -> None:
    """Write a table for `read_csv`; values survive the round trip exactly."""
    with written_whole(path) as part, part.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(_header(trace.num_experts))
        for step, load in enumerate(trace.load):
            for layer, row in zip(trace.layer_ids, load.tolist(), strict=True):
                writer.writerow([step, layer, *row])


def _header(experts: int) -> list[str]:
    return ["step", "layer", *(f"expert_{index}" for index in range(experts))]


def _integer(cell: str, place: str) -> int:
    try:
        return int(cell)
    except ValueError:
        raise TraceError(f"{place}: {cell[:40]!r} is not an integer") from None


def _row(cells: list[str], place: str) -> _Row:
    if max(map(len, cells)) <= _LONGEST_CELL:
        text = np.array(cells)
        with suppress(ValueError, OverflowError):
            return text.astype(np.int64)
        with suppress(ValueError):
            return text.astype(np.float64)
    wrong = (index for index, cell in enumerate(cells) if len(cell) > _LONGEST_CELL or not _is_number(cell))
    expert = next(wrong, 0)
    raise TraceError(f"{place}, expert_{expert}: {cells[expert][:40]!r} is not a number")


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _check_order(path: Path, steps: list[int], layers: list[int], num_layers: int) -> None:
    """Check that steps rise and that each has the layers of the first step."""
    for index, (step, layer) in enumerate(zip(steps, layers, strict=True)):
        begins = index % num_layers == 0
        step_fits = index == 0 or (step > steps[index - 1] if begins else step == steps[index - 1])
        if not step_fits or layer != layers[index % num_layers]:
            raise TraceError(
                f"{path}: row {index + 1} is of step {step}, layer {layer}: rows have to be sorted by step, "
                f"each with the {num_layers} layers of the first step in the same order"
            )
    if len(steps) % num_layers:
        raise TraceError(
            f"{path}: ends in the middle of step {steps[-1]}, after {len(steps) % num_layers} of "
            f"{num_layers} layers"
        )
