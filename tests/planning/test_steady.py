"""Steady traffic: exchanges reach what a plan from scratch reaches, and then stop; noise is not followed."""

from __future__ import annotations

import pytest
import torch

import eplb_plugin as eplb
from eplb_plugin.offline.simulation import PolicySetup, SimulationResult, simulate
from eplb_plugin.offline.traces import LoadTrace

TOPOLOGY = eplb.Topology(num_ranks=32, num_slots=288)
CELLS = 4 * 288


def poisson(tokens: int, steps: int, seed: int = 0, experts: int = 256) -> LoadTrace:
    """Independent steps of the same mean load: 4 layers of experts, lognormal with sigma 0.65."""
    generator = torch.Generator().manual_seed(seed)
    rate = torch.empty(4, experts, dtype=torch.float64).log_normal_(0, 0.65, generator=generator)
    rate *= tokens / rate.sum(1, keepdim=True)
    load = torch.poisson(rate.expand(steps, -1, -1).contiguous(), generator=generator)
    return LoadTrace(load.to(torch.int32), "steady, Poisson")


def from_scratch(
    window: torch.Tensor, topology: eplb.Topology, current: eplb.Placement | None
) -> eplb.Placement:
    return eplb.plan(window, topology).placement


def replay(trace: LoadTrace, topology: eplb.Topology) -> tuple[SimulationResult, SimulationResult]:
    fresh = PolicySetup("from scratch", from_scratch)
    return simulate(trace, topology, "adaptive", 64), simulate(trace, topology, fresh, 64)


@pytest.mark.parametrize(
    "topology", [TOPOLOGY, eplb.Topology(num_nodes=4, num_ranks=32, num_slots=288, num_groups=8)]
)
def test_steady_traffic_is_balanced_as_from_scratch_and_then_left_alone(topology):
    kept, fresh = replay(poisson(65536, 384), topology)
    for here, there in list(zip(kept.intervals, fresh.intervals, strict=True))[2:]:
        assert here.balancedness >= there.balancedness - 0.003
    assert all(item.moves <= 0.01 * CELLS for item in kept.intervals[3:])
    # Exchanges get there with a fraction of the moves.
    assert sum(item.moves for item in kept.intervals) < 0.7 * fresh.intervals[0].moves


@pytest.mark.parametrize(("experts", "slots", "ranks"), [(32, 64, 32), (16, 32, 16), (64, 80, 16)])
def test_few_slots_a_rank_are_balanced_as_from_scratch_too(experts, slots, ranks):
    """With two slots a rank, single exchanges alone end two points lower."""
    kept, fresh = replay(
        poisson(65536, 448, experts=experts), eplb.Topology(num_ranks=ranks, num_slots=slots)
    )
    for here, there in list(zip(kept.intervals, fresh.intervals, strict=True))[3:]:
        assert here.balancedness >= there.balancedness - 0.003
    later = kept.intervals[3:]
    assert sum(item.moves for item in later) <= 0.01 * 4 * slots * len(later)


def test_noise_of_few_tokens_is_not_followed():
    kept, fresh = replay(poisson(2048, 448), TOPOLOGY)
    later = kept.intervals[3:]
    assert sum(item.moves for item in later) <= 0.02 * CELLS * len(later)
    assert all(item.moves > 10 * 0.02 * CELLS for item in fresh.intervals)
