"""The recorder: intervals of a serving engine go to a folder, written beside serving."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from ..core.errors import ConfigError
from ..core.placement import Placement
from ..core.topology import Topology
from ..formats.recordings import RecordedInterval, next_name, remove_oldest, write_interval
from .control.throttle import lower_priority
from .load_window import IntervalLoad

__all__ = ["Recorder"]

_logger = logging.getLogger(__name__)
_MOST_WAITING = 4  # intervals in memory for a slow disk


class Recorder:
    """Writes intervals to a folder, one file each. Made on the first rank alone.

    A thread writes what waits and then ends; the process waits for it at its exit. A killed process loses at
    most the intervals that were waiting. Failures are logged once and counted: serving goes on.

    Args:
        folder: made if it is missing.
        max_mib: bound on the size of its files, in MiB; the oldest are removed first.
        engine, model: their names; empty: unknown.
        layer_ids: layer of the model of each row; empty: unknown.
        copies: ranks that count each token: the others are taken off.

    Attributes:
        written: intervals written.
        lost: intervals that could not be written, or came faster than the disk takes them.

    Raises:
        ConfigError: the folder cannot be made, or is a file.
    """

    def __init__(
        self,
        folder: str | Path,
        max_mib: int,
        *,
        engine: str = "",
        model: str = "",
        layer_ids: Sequence[int] = (),
        copies: int = 1,
    ) -> None:
        self.folder = Path(folder)
        self.engine, self.model = engine, model
        self.layer_ids, self.copies = tuple(layer_ids), copies
        self.written = self.lost = 0
        self._max_bytes = max_mib << 20
        self._started = time.time()
        self._number = 0
        self._waiting: deque[RecordedInterval] = deque()
        self._lock = threading.RLock()
        self._thread: threading.Thread | None = None
        self._said = False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:  # ValueError: an impossible name
            raise ConfigError(f"record={str(folder)!r}: cannot be made: {error}") from None

    def add(
        self,
        interval: IntervalLoad,
        placement: Placement,
        topology: Topology,
        *,
        expert_bytes: float,
        step_seconds: float,
        num_steps: int,
    ) -> None:
        """Have an interval written, unless it has no load. Returns at once.

        Args:
            interval: tokens as counted over all ranks, on the CPU; not to be written to afterwards.
            placement: in force during the interval.
            topology: ranks, nodes, slots and groups.
            expert_bytes: mean size of one expert's weights; 0: unknown.
            step_seconds: duration of a forward step; 0: unknown.
            num_steps: forward steps of the interval; 0: unknown.
        """
        if not bool(interval.snapshots.any()):
            return
        recorded = RecordedInterval(
            snapshots=interval.snapshots // self.copies,
            samples=interval.samples // self.copies,
            placement=placement,
            topology=topology,
            # Ids that do not fit would make a file that nobody can read.
            layer_ids=self.layer_ids if len(self.layer_ids) == interval.snapshots.shape[1] else (),
            expert_bytes=expert_bytes,
            step_seconds=step_seconds,
            steps=num_steps,
            copies=self.copies,
            engine=self.engine,
            model=self.model,
        )
        with self._lock:
            if len(self._waiting) >= _MOST_WAITING:
                self.lose(f"{_MOST_WAITING} intervals wait already")
                return
            self._waiting.append(recorded)
            if self._thread is None:
                # Not a daemon: the interpreter waits for what has been recorded.
                self._thread = threading.Thread(target=self._write, name="eplb-record", daemon=False)
                self._thread.start()

    def flush(self, time_limit: float = 30.0) -> None:
        """Wait until all intervals are written, or for `time_limit` seconds."""
        thread = self._thread
        if thread is not None:
            thread.join(time_limit)

    def _write(self) -> None:
        lower_priority()
        while True:
            with self._lock:
                if not self._waiting:
                    self._thread = None
                    return
                interval = self._waiting.popleft()
                self._number += 1
            try:
                write_interval(self.folder / next_name(self._started, self._number), interval)
                self.written += 1
                remove_oldest(self.folder, self._max_bytes)
            except Exception as error:  # the next interval may fare better, and serving is not concerned
                self.lose(f"{type(error).__name__}: {error}")

    def lose(self, cause: str) -> None:
        """Count an interval that is not recorded, and log the first one."""
        with self._lock:
            self.lost += 1
            told, self._said = self._said, True
        if not told:
            _logger.error("an interval is not recorded: %s. Later ones are only counted", cause)
