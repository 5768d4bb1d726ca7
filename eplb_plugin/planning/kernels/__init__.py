"""Compiled search over the placements of single layers, for loads on the CPU.

The functions here release the interpreter lock and are cached on disk. They run without `fastmath`, and
every sum has a fixed order, so the same input gives the same placement on every machine.

With several snapshots the search lowers the smooth peak. A single load, which has no future to differ from,
is planned for its true peak.
"""

from .entrance import plan_layers
from .group_nodes import choose_nodes
from .rank_bounds import bound_rows

__all__ = ["bound_rows", "choose_nodes", "plan_layers"]
