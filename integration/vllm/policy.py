"""The policy object in place of vLLM's own: it answers each call with a valid map."""

from __future__ import annotations

import dataclasses
import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...core.errors import LoadError
from ...core.topology import Topology
from ...observability.prometheus import Telemetry
from ...planning.planner import plan
from ...runtime.control.rank_group import RankGroup
from ..common.expert_bytes import ExpertBytes
from ..common.options import EngineOptions
from ..common.planner import EnginePlanner
from ..common.recording import ModelRecorder
from ..common.shares import DispatchInForce, IndexMapping
from .warnings import dropped_plan

__all__ = ["Interval", "RecordedModel", "VllmPolicy"]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Interval:
    """The load of one model between two rearrangements.

    Attributes:
        model: vLLM's name of the model.
        load: int64 [snapshots, layers, logical] on the CPU, tokens over all ranks, in time order.
        samples: int64 [samples, layers, logical] on the CPU, single steps, likewise; None: none.
        failures: int64 [1] on the CPU, number of ranks without a load.
        ready: waits for the copies of both from the device.
        error: cause of this rank's missing load, else None.
        expert_bytes: gives the bytes of one expert's weights by layer; None where they are unknown.
        steps: forward steps between two rearrangements; 0: unknown.
        waits: whether vLLM waits for the transfers: in its synchronous mode.
        mapping: vLLM's own mapping from experts to slots; None where it is unknown.
        step_seconds: duration of a forward step on this rank; 0: unknown.
    """

    model: str
    load: torch.Tensor
    samples: torch.Tensor | None = None
    failures: torch.Tensor | None = None
    ready: Callable[[], object] = lambda: None
    error: Exception | None = None
    expert_bytes: ExpertBytes | None = None
    steps: int = 0
    waits: bool = True
    mapping: IndexMapping | None = None
    step_seconds: float = 0.0

    def arrived(self) -> torch.Tensor:
        """The load, once it is on the host; raises if a rank had none."""
        self.ready()
        if self.error is not None:
            raise self.error
        if self.failures is not None and bool(self.failures):
            raise LoadError(f"{int(self.failures)} ranks could not read their window")
        return self.load


class RecordedModel(NamedTuple):
    """What a recording says of a model beside its loads.

    Attributes:
        layer_ids: layer of the model of each row; empty: unknown.
        copies: ranks that count each token.
        subfolder: of the folder for recordings; empty for the model itself, on the first pipeline stage.
    """

    layer_ids: tuple[int, ...]
    copies: int
    subfolder: str


class VllmPolicy:
    """Answers vLLM's calls of `policy.rebalance_experts`, in its synchronous and its asynchronous mode.

    vLLM hands its policy one summed load. Snapshots come by `expect`, called by all ranks before vLLM
    rearranges. Without them, the call uses the summed load.

    Args:
        own: vLLM's own policy: it answers while the group of ranks changes.
        ranks: gives the ranks that compare their plans, on the CPU; asked at each call. None: no comparison.
        speaks: whether this rank writes the log line of each rebalance.

    Attributes:
        planners: by model.
        telemetry: the series of this process, or None.
        dispatch: dispatch `balanced` in force; None while vLLM's own mapping is.
        drops_small_plans: whether vLLM drops plans that gain little, see `dropped_plan`.
        folder: where loads are recorded; None where they are not.
    """

    def __init__(
        self,
        options: EngineOptions,
        own: Any,
        ranks: Callable[[], RankGroup] | None = None,
        speaks: bool = True,
    ) -> None:
        self.options = options
        self.own = own
        self.planners: dict[str, EnginePlanner] = {}
        self.telemetry: Telemetry | None = None
        self.dispatch: DispatchInForce | None = None
        self.drops_small_plans = False
        self.folder: str | None = options.record
        self._models: dict[str, RecordedModel] = {}
        self._ranks = ranks
        self._speaks = speaks
        self._expected: deque[Interval] = deque()
        self._profiling = False
        self._scaling = False

    def expect(self, intervals: Sequence[Interval]) -> None:
        """Announce the calls of a rearrangement: one for each model, in vLLM's order."""
        self._expected = deque(intervals)
        self._profiling = self._scaling = False

    def expect_profiling(self) -> None:
        """Announce calls that measure memory: the map in force answers them."""
        self._expected.clear()
        self._profiling, self._scaling = True, False

    def expect_scaling(self) -> None:
        """Announce a change of the group of ranks: vLLM's own policy answers, and the history is dropped."""
        self._expected.clear()
        self._profiling, self._scaling = False, True
        for planner in self.planners.values():
            planner.forget()

    def rebalance_experts(
        self,
        weight: torch.Tensor,
        num_replicas: int,
        num_groups: int,
        num_nodes: int,
        num_ranks: int,
        old_global_expert_indices: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The signature of vLLM's policies. It writes to none of its inputs.

        Args:
            weight: [layers, logical], tokens.
            num_replicas: slots over all ranks.
            old_global_expert_indices: integer [layers, slots], the map in force.

        Returns:
            int64 [layers, slots] on the CPU; the map in force after a failure or where the gain is too small.
        """
        old, numbers = old_global_expert_indices, (num_replicas, num_groups, num_nodes, num_ranks)
        observes = self.options.mode == "observe"
        if (
            self._scaling
            or (old is None and observes)
            or (old is not None and (old.shape[1] != num_replicas or bool((old < 0).any())))
        ):
            return self._by_vllm(weight, *numbers, old)
        if self._profiling and old is not None:
            return old.to("cpu", torch.int64, copy=True)

        sizes = {"num_nodes": num_nodes, "num_ranks": num_ranks, "num_slots": num_replicas}
        topology = partial(Topology, **sizes, num_groups=max(num_groups, 1))
        if old is None:
            # Without a map in force there is nothing to keep after a failure: vLLM answers then.
            try:
                placement = plan(weight.cpu(), topology(), options=self.options.planner).placement
                return placement.physical_to_logical
            except Exception as error:
                _logger.error("no plan without a map in force: %s; vLLM's own policy answers", error)
                return self._by_vllm(weight, *numbers)
        interval = self._expected.popleft() if self._expected else Interval("model", weight.unsqueeze(0))
        samples, planner, dispatch = interval.samples, self.planner_of(interval.model), self.dispatch
        drops = self.drops_small_plans
        planner.dispatch = None if dispatch is None else lambda: dispatch
        planner.mapping = interval.mapping
        return planner.rebalance(
            lambda: (interval.arrived(), topology()),
            old,
            samples=None if samples is None else lambda: samples,
            ranks=self._ranks,
            expert_bytes=interval.expert_bytes,
            refuses=(lambda was, new: dropped_plan(weight, was, new, num_ranks)) if drops else None,
            steps=lambda: interval.steps,
            waits=interval.waits,
            step_seconds=interval.step_seconds,
        )

    def know(self, model: str, about: RecordedModel) -> None:
        """A model that vLLM has added. With a folder, its recording begins.

        Raises:
            ConfigError: the folder cannot be made.
        """
        self._models[model] = about
        self._record(model)

    def record_to(self, folder: str | None) -> str | None:
        """Record the loads of all models in `folder` from the next interval on; None ends recording.

        Returns:
            The folder as an absolute path; None on ranks that write nothing.

        Raises:
            ConfigError: the folder cannot be made; then nothing is recorded.
        """
        self.folder = folder
        for model in self._models:
            self._record(model)
        return None if folder is None or not self._speaks else str(Path(folder).absolute())

    def _record(self, model: str) -> None:
        planner, about = self.planner_of(model), self._models[model]
        before, planner.recorder = planner.recorder, None
        if before is not None:
            before.files.flush()
        if self.folder is not None and self._speaks:
            folder = str(Path(self.folder) / about.subfolder)
            planner.recorder = ModelRecorder(
                folder, self.options.record_mib, "vLLM", model, about.layer_ids, about.copies
            )

    def report(self) -> dict[str, Any]:
        """Options, and for each model its failures, warnings and latest reports, as plain data."""
        return {
            "options": self.options.model_dump(mode="json"),
            "models": {
                model: {
                    "failures": planner.failures,
                    "warnings": dict(planner.warnings),
                    "recorded": _recorded(planner),
                    "reports": [dataclasses.asdict(report) for report in list(planner.reports)],
                }
                # Copies: in the asynchronous mode, another thread plans meanwhile.
                for model, planner in list(self.planners.items())
            },
        }

    def _by_vllm(self, *arguments: Any) -> torch.Tensor:
        result: torch.Tensor = self.own.rebalance_experts(*arguments)
        return result

    def planner_of(self, model: str) -> EnginePlanner:
        """The planner of a model, the same object for the same name."""
        if model not in self.planners:
            self.planners[model] = EnginePlanner(self.options, model=model, speaks=self._speaks)
        planner = self.planners[model]
        planner.telemetry = None if self.telemetry is None else self.telemetry.of(model)
        return planner


def _recorded(planner: EnginePlanner) -> dict[str, Any] | None:
    """Folder and numbers of the recording; None where this rank records nothing."""
    recorder = planner.recorder
    if recorder is None:
        return None
    files = recorder.files
    return {"folder": str(files.folder.absolute()), "written": files.written, "lost": files.lost}
