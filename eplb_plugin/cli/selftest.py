"""A small plan and its checks: the self-test of `doctor`."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from ..config.options import PlannerOptions
from ..core.balancedness import balancedness, peak_rank_loads
from ..core.placement import Placement
from ..core.topology import Topology
from ..offline.synthetic_traffic import generate
from ..planning.planner import plan

__all__ = ["SelfTest", "self_test"]

_TOPOLOGY = Topology(num_nodes=2, num_ranks=8, num_slots=40, num_groups=4)
_LAYERS = 8


@dataclass(frozen=True)
class SelfTest:
    """Result of the self-test.

    Attributes:
        first_ms: time of the first plans in milliseconds, with compiling or loading of the kernels.
        plan_ms: time of a later plan in milliseconds.
        before: balancedness of the default placement, with which engines start.
        after: balancedness of the plan.
        problems: one line for each.
    """

    first_ms: float
    plan_ms: float
    before: float
    after: float
    problems: tuple[str, ...]


def self_test(options: PlannerOptions) -> SelfTest:
    """Plan for a small load from scratch and from the placement in force, and check the plans."""
    load = generate("gpt-oss-20b", layers=_LAYERS, steps=16, tokens_per_step=256).load
    default = Placement.default(_LAYERS, load.shape[2], _TOPOLOGY.num_slots)
    began = time.perf_counter()
    plan(load, _TOPOLOGY, None, options)
    plan(load, _TOPOLOGY, default, options)
    first_ms = 1000 * (time.perf_counter() - began)

    scratch = plan(load, _TOPOLOGY, None, options)
    grown = plan(load, _TOPOLOGY, default, options)
    before = balancedness(load, default, _TOPOLOGY)
    problems = []
    for name, made in (("from scratch", scratch), ("from the placement in force", grown)):
        made.placement.validate(_TOPOLOGY)
        after = balancedness(load, made.placement, _TOPOLOGY)
        if abs(after - made.balancedness) > 1e-9:
            problems.append(f"plan {name}: promises a balancedness of {made.balancedness}, but has {after}")
        if after < before:
            problems.append(f"plan {name}: balancedness {after:.4f} is worse than {before:.4f} without one")
        peak = peak_rank_loads(load, made.placement, _TOPOLOGY).mean(0)
        if bool((peak < made.lower_bound * (1 - 1e-9)).any()):
            problems.append(f"plan {name}: its peak is below the lower bound")
    again = plan(load, _TOPOLOGY, default, options)
    if not torch.equal(again.placement.physical_to_logical, grown.placement.physical_to_logical):
        problems.append("the same load gave two different plans")
    return SelfTest(first_ms, 1000 * grown.seconds, before, grown.balancedness, tuple(problems))
