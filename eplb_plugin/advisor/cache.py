"""Cache of trials in a folder. A trial is a pure function of the parts of its key."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from functools import cache
from pathlib import Path

from pydantic import ValidationError

from ..config.options import PlannerOptions, RebalancerOptions
from ..core.errors import TraceError
from ..core.safe_files import written_whole
from ..core.topology import Topology
from ..offline.traces import LoadTrace
from .trial import Setting, Trial

__all__ = ["TrialCache"]

_RUN_BY_TRIALS = ("advisor", "core", "offline", "planning", "runtime/weights")


class TrialCache:
    """A folder of trials.

    Args:
        folder: created with the first trial; None disables the cache.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self.hits = 0

    def key(
        self,
        trace: LoadTrace,
        topology: Topology,
        setting: Setting,
        planner: PlannerOptions,
        rebalancer: RebalancerOptions,
    ) -> str:
        """Digest of the load, the topology, the options and the code of a trial."""
        about = {
            "load": [str(trace.load.dtype), list(trace.load.shape)],
            "topology": dataclasses.asdict(topology),
            "setting": dataclasses.asdict(setting),
            "planner": planner.model_dump(mode="json"),
            "window": [rebalancer.snapshots, rebalancer.history],
            "code": _code(),
        }
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
        digest.update(trace.load.contiguous().numpy().data)
        return digest.hexdigest()

    def get(self, key: str) -> Trial | None:
        """The trial of a key, or None. An unreadable file is ignored: the trial is repeated."""
        if self._folder is None:
            return None
        try:
            trial = Trial.model_validate_json((self._folder / f"{key}.json").read_bytes())
        except (OSError, ValidationError):
            return None
        self.hits += 1
        return trial

    def put(self, key: str, trial: Trial) -> None:
        """Store a trial.

        Raises:
            TraceError: the folder cannot be written.
        """
        if self._folder is None:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TraceError(f"{self._folder}: cannot be written: {error}") from None
        with written_whole(self._folder / f"{key}.json") as part:
            part.write_text(trial.model_dump_json(), encoding="utf-8")


@cache
def _code() -> str:
    """Digest of all code of a trial: a new version of the planner repeats the trials."""
    package = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(path for part in _RUN_BY_TRIALS for path in (package / part).rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
