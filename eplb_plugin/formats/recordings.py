"""Recordings: a folder with one `.npz` for each interval of a serving engine, the oldest removed first."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..core.errors import EplbError, TraceError
from ..core.placement import Placement
from ..core.safe_files import MAX_BYTES, opened_zip, written_whole
from ..core.topology import Topology
from ..offline.traces import LoadTrace, as_load, check_layer_ids
from .npz import NpzArrays, layer_ids_of

__all__ = [
    "RecordedInterval",
    "Recording",
    "is_recording",
    "next_name",
    "read_interval",
    "read_recording",
    "recorded_files",
    "remove_oldest",
    "write_interval",
]

FORMAT = "eplb-plugin recording 1"
_FILES = "interval-*.npz"
_MOST_NAMES = 3  # of files left out
_LONGEST_NAME = 300  # characters of a model's name


@dataclass(frozen=True, eq=False, kw_only=True)
class RecordedInterval:
    """What one file says.

    Attributes:
        snapshots: int64 [snapshots, layers, logical], tokens over all ranks, sums of steps in time order.
        samples: int64 [samples, layers, logical], tokens of single steps over all ranks, evenly spaced.
        placement: in force during the interval.
        topology: ranks, nodes, slots and groups.
        layer_ids: layer of the model of each row; empty: unknown.
        expert_bytes: mean size of one expert's weights; 0: unknown.
        step_seconds: median duration of a forward step; 0: unknown.
        steps: forward steps of the interval; 0: unknown.
        copies: ranks that have each token; the loads count it once.
        engine: such as `vLLM`; empty: unknown.
        model: its name; empty: unknown.
    """

    snapshots: torch.Tensor
    samples: torch.Tensor
    placement: Placement
    topology: Topology
    layer_ids: tuple[int, ...] = ()
    expert_bytes: float = 0.0
    step_seconds: float = 0.0
    steps: int = 0
    copies: int = 1
    engine: str = ""
    model: str = ""


@dataclass(frozen=True, eq=False, kw_only=True)
class Recording:
    """A folder of intervals, or one of its files.

    Attributes:
        trace: loads of all intervals, with their samples.
        newest: the last interval: its map was in force last.
        step_seconds: median over the intervals; 0: unknown.
        left_out: files that could not be read, and older ones of another shape: a sentence each, with the
            names of the newest of them.
    """

    trace: LoadTrace
    newest: RecordedInterval
    step_seconds: float
    left_out: tuple[str, ...]


def recorded_files(folder: Path) -> list[Path]:
    """The files of a recording, the oldest first."""
    return sorted(folder.glob(_FILES))


def is_recording(path: str | Path) -> bool:
    """Whether the path is a folder with recorded intervals, or one of these files."""
    path = Path(path)
    if os.path.isdir(path):
        return any(path.glob(_FILES))
    if path.suffix.lower() != ".npz" or not os.path.isfile(path):
        return False
    try:
        with opened_zip(path, "a readable .npz (zip) file") as archive:
            return {"format.npy", "physical_to_logical.npy", "samples.npy"} <= set(archive.namelist())
    except TraceError:
        return False


def next_name(started: float, number: int) -> str:
    """The name of a file, so that names sort by time.

    Args:
        started: when recording began, in seconds since 1970.
        number: of the interval, from 1.
    """
    moment = time.strftime("%Y%m%dT%H%M%S", time.gmtime(started))
    return f"interval-{moment}.{int(started * 1e6) % 1_000_000:06d}-{number:08d}.npz"


def write_interval(path: Path, interval: RecordedInterval) -> None:
    """Write one file whole: killed at any moment, the process leaves it complete or absent.

    Raises:
        TraceError: the file cannot be written.
    """
    topology = interval.topology
    arrays: dict[str, Any] = {
        "format": np.array(FORMAT),
        "load": _compact(interval.snapshots),
        "samples": _compact(interval.samples),
        "physical_to_logical": interval.placement.physical_to_logical.numpy().astype(np.int32),
        "num_logical": np.array(interval.placement.num_logical),
        "num_ranks": np.array(topology.num_ranks),
        "num_nodes": np.array(topology.num_nodes),
        "num_groups": np.array(topology.num_groups),
        "expert_bytes": np.array(float(interval.expert_bytes)),
        "step_seconds": np.array(float(interval.step_seconds)),
        "steps": np.array(interval.steps),
        "copies": np.array(interval.copies),
        "engine": np.array(interval.engine[:_LONGEST_NAME]),
        "model": np.array(interval.model[:_LONGEST_NAME]),
    }
    if interval.layer_ids:
        arrays["layer_ids"] = np.array(interval.layer_ids, np.int64)
    if topology.rank_slots is not None:
        arrays["rank_slots"] = np.array(topology.rank_slots, np.int64)
    with written_whole(path) as part, part.open("wb") as stream:
        np.savez_compressed(stream, **arrays)


def remove_oldest(folder: Path, max_bytes: int) -> None:
    """Remove the oldest files of a recording until the rest fit into `max_bytes`; the newest always stays.

    Files that killed processes have left half-written are removed as well.

    Raises:
        OSError: a file cannot be removed.
    """
    for part in folder.glob(f"{_FILES}.*.part"):
        pid = part.name.split(".")[-2]
        if not (pid.isdigit() and _runs(int(pid))):
            part.unlink(missing_ok=True)
    files = recorded_files(folder)
    sizes = [file.stat().st_size for file in files]
    total = sum(sizes)
    for file, size in zip(files[:-1], sizes, strict=False):
        if total <= max_bytes:
            break
        file.unlink(missing_ok=True)
        total -= size


def read_interval(path: Path, max_bytes: int = MAX_BYTES) -> RecordedInterval:
    """Read one file.

    Raises:
        TraceError: it is missing, damaged, too large, of another kind, or its arrays contradict each other.
    """
    with opened_zip(path, "a readable .npz (zip) file") as archive:
        arrays = NpzArrays(archive, path, max_bytes)
        if arrays.text("format") != FORMAT:
            raise TraceError(f"{path}: has the format {arrays.text('format')!r}, not {FORMAT!r}")
        snapshots, samples = (as_load(arrays.read(name), str(path)) for name in ("load", "samples"))
        rows = arrays.integers("physical_to_logical", 2)
        numbers = {name: arrays.number(name) for name in ("num_ranks", "num_nodes", "num_groups")}
        uneven = "rank_slots" in arrays.names
        rank_slots = tuple(arrays.integers("rank_slots", 1).tolist()) if uneven else None
        num_logical, steps, copies = (arrays.number(name) for name in ("num_logical", "steps", "copies"))
        amounts = [arrays.amount(name) for name in ("expert_bytes", "step_seconds")]
        layer_ids = layer_ids_of(arrays)
        engine, model = arrays.text("engine"), arrays.text("model")
    try:
        placement = Placement(torch.from_numpy(rows.astype(np.int64)), num_logical)
        topology = Topology(num_slots=rows.shape[1], rank_slots=rank_slots, **numbers)
        placement.validate(topology)
    except EplbError as error:
        raise TraceError(f"{path}: {error}") from None
    if snapshots.dim() != 3 or snapshots.shape[1:] != (placement.num_layers, num_logical):
        raise TraceError(f"{path}: load {tuple(snapshots.shape)} does not fit {placement}")
    if len(samples) and samples.shape[1:] != snapshots.shape[1:]:
        raise TraceError(f"{path}: samples {tuple(samples.shape)} do not fit load {tuple(snapshots.shape)}")
    if layer_ids:
        check_layer_ids(str(path), layer_ids, placement.num_layers)
    return RecordedInterval(
        snapshots=snapshots,
        samples=samples,
        placement=placement,
        topology=topology,
        layer_ids=layer_ids,
        expert_bytes=amounts[0],
        step_seconds=amounts[1],
        steps=max(steps, 0),
        copies=max(copies, 1),
        engine=engine,
        model=model,
    )


def read_recording(path: str | Path, max_bytes: int = MAX_BYTES) -> Recording:
    """Read a folder of intervals, or one of its files.

    Counted are the newest file that can be read, and the older ones of the same layers and experts, up to the
    bound.

    Args:
        path: folder or file.
        max_bytes: bound on the unpacked size of all files.

    Raises:
        TraceError: no file can be read, or none has a load.
    """
    path = Path(path)
    files = recorded_files(path) if os.path.isdir(path) else [path]
    if not files:
        raise TraceError(f"{path}: a folder without recorded intervals ({_FILES})")
    kept: list[RecordedInterval] = []
    broken: list[Path] = []
    others: list[Path] = []
    reasons: list[str] = []
    left = max_bytes
    for file in reversed(files):
        try:
            interval = read_interval(file, left)
        except TraceError as error:
            broken.append(file)
            reasons.append(str(error).removeprefix(f"{file}: "))
            continue
        if kept and _shape(interval) != _shape(kept[0]):
            others.append(file)
            continue
        left -= sum(part.nbytes for part in (interval.snapshots, interval.samples))
        kept.append(interval)
    if not kept:
        first = f"{broken[0]}: {reasons[0]}"
        raise TraceError(first if len(files) == 1 else f"{first}; {len(broken)} files are like that")
    left_out = []
    if broken:
        one = len(broken) == 1
        count = "1 file cannot be read, and is" if one else f"{len(broken)} files cannot be read, and are"
        left_out.append(f"{count} left out: {_names(broken, reasons[0])}")
    if others:
        count = "1 older file is" if len(others) == 1 else f"{len(others)} older files are"
        left_out.append(f"{count} of another model, and left out: {_names(others)}")
    newest, kept = kept[0], kept[::-1]
    times = sorted(interval.step_seconds for interval in kept if interval.step_seconds > 0)
    return Recording(
        trace=_trace(str(path), kept),
        newest=newest,
        step_seconds=times[len(times) // 2] if times else 0.0,
        left_out=tuple(left_out),
    )


def _trace(name: str, intervals: Sequence[RecordedInterval]) -> LoadTrace:
    loads = [interval.snapshots for interval in intervals]
    samples = [interval.samples for interval in intervals]
    steps: list[int] = []
    first = 0
    for load, single in zip(loads, samples, strict=True):
        steps += [first + at * len(load) // max(len(single), 1) for at in range(len(single))]
        first += len(load)
    if not first:
        raise TraceError(f"{name}: holds no load")
    known = [interval for interval in intervals if interval.steps]
    rows = sum(len(interval.snapshots) for interval in known)
    return LoadTrace(
        torch.cat([load.long() for load in loads]),
        name,
        intervals[-1].layer_ids,
        samples=torch.cat([single.long() for single in samples]) if steps else None,
        sample_steps=tuple(steps),
        engine_steps=sum(interval.steps for interval in known) / rows if rows else 1.0,
    )


def _names(files: Sequence[Path], reason: str = "") -> str:
    """For example `a.npz (is damaged), b.npz, c.npz and 2 more`; `reason` is of the first."""
    shown = [file.name for file in files[:_MOST_NAMES]]
    if reason:
        shown[0] += f" ({reason})"
    more = f" and {len(files) - len(shown)} more" if len(files) > len(shown) else ""
    return f"{', '.join(shown)}{more}"


def _shape(interval: RecordedInterval) -> tuple[Any, ...]:
    return (interval.snapshots.shape[1:], interval.layer_ids, interval.model)


def _compact(load: torch.Tensor) -> np.ndarray[Any, Any]:
    """With 32 bits where that is enough: half of the work and of the bytes."""
    peak = int(load.max()) if load.numel() else 0
    return load.numpy().astype(np.int32 if peak < 2**31 else np.int64)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        return True
    return True
