"""SGLang's dispatch `static`, made fair: its table of slots by rank and expert is ours."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from ...core.load import as_snapshots
from ...core.placement import Placement
from ...core.topology import Topology
from ...dispatch.shares import nearest_shares
from ...planning.fair_table import FairTable, fair_table, plan_fair_table
from ...planning.forecast import expected_load
from ..common.options import EngineOptions
from ..common.planner import EnginePlanner

__all__ = ["SglangPlanner", "known_map", "map_of_table"]

_maps: list[torch.Tensor] = []  # of the call that is under way


@contextmanager
def known_map(physical_to_logical: torch.Tensor) -> Iterator[None]:
    """Tell `map_of_table` the map that SGLang makes its tables for."""
    _maps.append(physical_to_logical)
    try:
        yield
    finally:
        _maps.pop()


def map_of_table() -> torch.Tensor | None:
    """The map that a table is made for, integer [layers, slots]; None outside of `known_map`.

    SGLang hands its own function lists of replicas. At the start these hold the nearest replica alone.
    """
    return _maps[-1] if _maps else None


class SglangPlanner(EnginePlanner):
    """Plans with the shares of SGLang's dispatch.

    Attributes:
        static: the table of dispatch `static` in force: ours, SGLang's own, or None with another dispatch.
    """

    def __init__(self, options: EngineOptions) -> None:
        super().__init__(options)
        self.static: Literal["fair", "engine"] | None = None
        # That of the latest plan, and the one before: ranks may not have agreed on the latest.
        self._tables: deque[FairTable] = deque(maxlen=2)
        self._served: FairTable | None = None  # the one that `row` was asked for last

    def compile_tables(self) -> None:
        """Compile whatever the first table would compile, or load it from the cache on disk."""
        topology, placement = Topology(num_ranks=2, num_slots=4), Placement.default(1, 3, 4)
        load = torch.ones(1, 3, dtype=torch.float64)
        fair_table(placement, topology).of_rank(0)
        plan_fair_table(load, topology, placement, placement, self.options.planner)

    def plan(self, window: torch.Tensor, topology: Topology, current: Placement) -> Placement:
        """See `EnginePlanner.plan`; with a fair table, experts may change slots for it."""
        planned = super().plan(window, topology, current)
        return self.with_table(window, topology, planned, current)

    def with_table(
        self, window: torch.Tensor, topology: Topology, planned: Placement, current: Placement | None
    ) -> Placement:
        """The placement to go to, and its fair table for `row`; `planned` where the table is not ours.

        Args:
            window: [snapshots, layers, logical] or [layers, logical] in time order, tokens.
            current: the placement in force; None: there is none yet.
        """
        if self.static != "fair":
            return planned
        options = self._priced_options(topology)
        snapshots = as_snapshots(window).cpu()
        load = expected_load(snapshots, options.snapshot_decay, options.persistence).mean(0)
        table = plan_fair_table(load, topology, planned, current, options)
        self._tables.append(table)
        return table.placement

    def row(self, placement: Placement, topology: Topology, rank: int) -> torch.Tensor:
        """int64 [layers, logical]: the slot that `rank` sends the tokens of each expert to."""
        self._served = self._table(placement, topology)
        return self._served.of_rank(rank)

    def _table(self, placement: Placement, topology: Topology) -> FairTable:
        for table in (*reversed(self._tables), self._served):
            if table is not None and table.placement == placement:
                return table
        # A map that was not planned here, as at the start: no load is known.
        self._tables.append(fair_table(placement, topology))
        return self._tables[-1]

    def shares(self, placement: Placement, topology: Topology, samples: torch.Tensor) -> torch.Tensor | None:
        """See `EnginePlanner.shares`."""
        if self.static == "fair":
            return self._table(placement, topology).shares
        if self.static == "engine":
            return nearest_shares(placement, topology)
        return super().shares(placement, topology, samples)

    def forget(self) -> None:
        """Drop the history, and tables for other ranks."""
        super().forget()
        self._tables.clear()
        self._served = None
