"""Plans of loads on a GPU are those of the same loads on the CPU."""

from __future__ import annotations

import pytest
import torch

import eplb_plugin as eplb
from eplb_plugin.planning.policies import POLICIES

SIZES = [
    # layers, experts, slots, groups, nodes, ranks
    (58, 256, 288, 8, 4, 32),
    (58, 256, 288, 8, 18, 144),
    (94, 128, 160, 1, 2, 16),
    (60, 384, 448, 1, 8, 64),
    (3, 17, 24, 1, 1, 6),
]


def topology_of(size: tuple[int, ...]) -> eplb.Topology:
    _, _, slots, groups, nodes, ranks = size
    return eplb.Topology(num_nodes=nodes, num_ranks=ranks, num_slots=slots, num_groups=groups)


def lognormal(*shape: int, sigma: float = 1.0) -> torch.Tensor:
    return torch.empty(*shape).log_normal_(5, sigma, generator=torch.Generator().manual_seed(0)).round()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("snapshots", [(), (5,)], ids=["one-load", "snapshots"])
def test_the_plan_is_that_of_the_cpu(size: tuple[int, ...], snapshots: tuple[int, ...], policy: str) -> None:
    load, topology = lognormal(*snapshots, *size[:2]), topology_of(size)
    options = eplb.PlannerOptions(policy=policy)
    here, there = (eplb.plan(x, topology, options=options) for x in (load, load.cuda()))
    assert there.placement.device.type == there.lower_bound.device.type == "cuda"
    assert torch.equal(there.placement.physical_to_logical.cpu(), here.placement.physical_to_logical)
    assert torch.equal(there.placement.logical_to_physical.cpu(), here.placement.logical_to_physical)
    assert torch.equal(there.placement.replica_count.cpu(), here.placement.replica_count)
    assert there.balancedness == here.balancedness


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int32, torch.int64])
@pytest.mark.parametrize("policy", POLICIES)
def test_loads_of_any_dtype(dtype: torch.dtype, policy: str) -> None:
    load, topology = lognormal(4, 64).clamp(max=2000).to(dtype), eplb.Topology(num_ranks=8, num_slots=80)
    options = eplb.PlannerOptions(policy=policy)
    here, there = (eplb.plan(x, topology, options=options).placement for x in (load, load.cuda()))
    assert torch.equal(there.physical_to_logical.cpu(), here.physical_to_logical)


def test_from_a_placement_in_force_it_is_the_compiled_plan() -> None:
    load, topology = lognormal(8, 6, 64), eplb.Topology(num_ranks=8, num_slots=80)
    start = eplb.Placement.default(6, 64, 80)
    here = eplb.plan(load, topology, start)
    there = eplb.plan(load.cuda(), topology, start)
    assert there.moves == here.moves > 0
    assert torch.equal(there.placement.physical_to_logical.cpu(), here.placement.physical_to_logical)
    on_gpu = start.physical_to_logical.cuda()
    again = eplb.plan(load.cuda(), topology, on_gpu, active_ranks=[rank != 2 for rank in range(8)])
    alive = eplb.plan(load, topology, start, active_ranks=[rank != 2 for rank in range(8)])
    assert torch.equal(again.placement.physical_to_logical.cpu(), alive.placement.physical_to_logical)


@pytest.mark.parametrize("objective", ["peak", "spread"])
@pytest.mark.parametrize("shape", [(5, 48), (58, 288)])
def test_packing_is_that_of_the_cpu(shape: tuple[int, ...], objective: str) -> None:
    weight, options = lognormal(*shape), eplb.EnsembleOptions(objective=objective)
    here, there = (eplb.balanced_packing(x, 6, options) for x in (weight, weight.cuda()))
    assert all(torch.equal(a, b.cpu()) for a, b in zip(here, there, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_a_bad_load_is_named(value: float) -> None:
    load = lognormal(2, 64)
    load[1, 7] = value
    with pytest.raises(eplb.LoadError, match="layer 1, expert 7"):
        eplb.plan(load.cuda(), eplb.Topology(num_ranks=8, num_slots=80))


def test_metrics_are_those_of_the_cpu() -> None:
    load, topology = lognormal(4, 6, 64), eplb.Topology(num_ranks=8, num_slots=80)
    placement = eplb.plan(load, topology).placement
    there = eplb.Placement(placement.physical_to_logical.cuda(), 64)
    loads = eplb.rank_loads(load.cuda(), there, topology).cpu()
    torch.testing.assert_close(loads, eplb.rank_loads(load, placement, topology), rtol=1e-12, atol=0)
    assert eplb.balancedness(load.cuda(), there, topology) == pytest.approx(
        eplb.balancedness(load, placement, topology), rel=1e-12
    )
