"""Loads as a table for spreadsheets: one row for each layer of each step, one column for each expert."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np

from ..core.errors import TraceError
from ..core.safe_files import MAX_TEXT_BYTES, read_bytes, written_whole
from ..offline.traces import LoadTrace, as_load

__all__ = ["read_csv", "write_csv"]

# An array of text takes the width of its longest cell for all of them.
_LONGEST_CELL = 64


def read_csv(path: str | Path, max_bytes: int = MAX_TEXT_BYTES) -> LoadTrace:
    """Read a table with the columns `step, layer, expert_0, expert_1, ...`.

    Rows are sorted by step, then layer, and every step has the same layers. Values are integers, or
    decimal numbers if any one is.

    Raises:
        TraceError: the file is too large or not such a table; names the line.
    """
    path = Path(path)
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
        rows: list[np.ndarray[tuple[int], np.dtype[np.float64 | np.int64]]] = []
        for cells in reader:
            place = f"{path}: line {reader.line_num}"
            if len(cells) != len(header):
                raise TraceError(f"{place} has {len(cells)} cells, the header {len(header)}")
            steps.append(_number(cells[0], f"{place}, step"))
            layers.append(_number(cells[1], f"{place}, layer"))
            rows.append(_row(cells[2:], place))
    except csv.Error as error:
        raise TraceError(f"{path}: line {reader.line_num}: {error}") from None
    if not rows:
        raise TraceError(f"{path}: has a header and no rows")
    num_layers = next((index for index, step in enumerate(steps) if step != steps[0]), len(steps))
    _check_order(path, steps, layers, num_layers)
    load = np.stack(rows).reshape(-1, num_layers, experts)
    return LoadTrace(as_load(load, str(path)), str(path), tuple(layers[:num_layers]))


def write_csv(path: str | Path, trace: LoadTrace) -> None:
    """Write the table that `read_csv` reads; values are written so that they are read as they were.

    Raises:
        TraceError: the file cannot be written.
    """
    with written_whole(path) as part, part.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(_header(trace.num_experts))
        for step, load in enumerate(trace.load):
            for layer, row in zip(trace.layer_ids, load.tolist(), strict=True):
                writer.writerow([step, layer, *row])


def _header(experts: int) -> list[str]:
    return ["step", "layer", *(f"expert_{index}" for index in range(experts))]


def _number(cell: str, place: str) -> int:
    try:
        return int(cell)
    except ValueError:
        raise TraceError(f"{place}: {cell[:40]!r} is not an integer") from None


def _row(cells: list[str], place: str) -> np.ndarray[tuple[int], np.dtype[np.float64 | np.int64]]:
    longest = max(range(len(cells)), key=lambda expert: len(cells[expert]))
    if len(cells[longest]) > _LONGEST_CELL:
        raise TraceError(f"{place}, expert_{longest}: {cells[longest][:40]!r}... is not a number")
    text = np.array(cells)
    try:
        return text.astype(np.int64)
    except (ValueError, OverflowError):
        pass
    try:
        return text.astype(np.float64)
    except ValueError:
        for expert, cell in enumerate(cells):
            try:
                float(cell)
            except ValueError:
                raise TraceError(f"{place}, expert_{expert}: {cell[:40]!r} is not a number") from None
        raise


def _check_order(path: Path, steps: list[int], layers: list[int], num_layers: int) -> None:
    """Every step has the layers of the first one, and steps rise."""
    for index, (step, layer) in enumerate(zip(steps, layers, strict=True)):
        begins = index % num_layers == 0
        step_fits = index == 0 or (step > steps[index - 1] if begins else step == steps[index - 1])
        if not step_fits or layer != layers[index % num_layers]:
            raise TraceError(
                f"{path}: row {index + 1} is of step {step}, layer {layer}: rows have to be sorted by step, "
                f"each with the {num_layers} layers of the first one in the same order"
            )
    if len(steps) % num_layers:
        raise TraceError(
            f"{path}: ends in the middle of step {steps[-1]}, after {len(steps) % num_layers} of "
            f"{num_layers} layers"
        )
