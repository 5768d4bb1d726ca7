"""The tensor planner waits for the device once, at the end; without a GPU, for a fake one."""

from __future__ import annotations

import pytest
import torch

import eplb_plugin as eplb
from eplb_plugin.planning.tensors import packing, refinement, single_look
from eplb_plugin.planning.tensors.host_waits import look

from .fake_gpu import WaitError, Watch, fake_gpu

HIERARCHICAL = eplb.Topology(num_nodes=4, num_ranks=32, num_slots=288, num_groups=8)
GLOBAL = eplb.Topology(num_ranks=16, num_slots=288)
MOST_OPS = 960  # of a plan of one load, 58 layers on HIERARCHICAL; about 560 of them are no views


def random_load(*shape: int) -> torch.Tensor:
    return torch.empty(*shape).log_normal_(4, 1, generator=torch.Generator().manual_seed(0)).round()


@pytest.fixture(autouse=True)
def _tensors_only(backend):
    if backend == "kernels":
        pytest.skip("the compiled search runs on the host")


@pytest.fixture
def seen(monkeypatch):
    """The numbers that were looked at; the look itself answers what a load and a placement would."""
    numbers = []

    def answer(tensor: torch.Tensor) -> list[float]:
        numbers.append(tensor)
        return [0.0, 1.0, 1.0, 0.0, 2.0][: tensor.numel()]

    for module in (packing, single_look):
        monkeypatch.setattr(module, "look", answer)
    return numbers


CASES = [
    pytest.param((4, 256), HIERARCHICAL, {}, id="one-load"),
    pytest.param((4, 256), GLOBAL, {}, id="global"),
    pytest.param((3, 4, 256), HIERARCHICAL, {}, id="snapshots"),
    pytest.param((40, 2, 256), GLOBAL, {"num_candidates": 8}, id="snapshots-condensed"),
    pytest.param((4, 256), HIERARCHICAL, {"objective": "spread"}, id="spread"),
    pytest.param((3, 2, 256), GLOBAL, {"objective": "spread"}, id="spread-of-snapshots"),
    pytest.param((4, 256), HIERARCHICAL, {"policy": "greedy"}, id="greedy"),
]


@pytest.mark.parametrize(("shape", "topology", "options"), CASES)
def test_a_plan_on_a_gpu_takes_one_look(shape, topology, options, seen):
    with fake_gpu():
        load = torch.empty(*shape, device="cuda")
        plan = eplb.plan(load, topology, options=eplb.PlannerOptions(**options))
        assert plan.placement.device.type == "cuda"
        assert plan.placement.physical_to_logical.shape == (shape[-2], topology.num_slots)
        assert plan.placement.logical_to_physical.shape == (shape[-2], 256, 2)
    assert len(seen) == 1


def test_a_plan_around_a_dead_rank_takes_one_look(seen):
    alive = [rank != 3 for rank in range(16)]
    with fake_gpu():
        eplb.plan(torch.empty(4, 256, device="cuda"), GLOBAL, active_ranks=alive)
    assert len(seen) == 1


@pytest.mark.parametrize("shape", [(5, 48), (3, 5, 48)])
def test_packing_on_a_gpu_takes_one_look(shape, seen):
    with fake_gpu():
        pack_index, _ = eplb.balanced_packing(torch.empty(*shape, device="cuda"), 6)
        assert pack_index.device.type == "cuda"
    assert len(seen) == 1


@pytest.mark.parametrize(("shape", "topology", "options"), CASES)
def test_a_plan_waits_for_nothing_but_its_look(shape, topology, options, monkeypatch):
    looks = []
    monkeypatch.setattr(single_look, "look", lambda numbers: looks.append(numbers) or look(numbers))
    with Watch():
        eplb.plan(random_load(*shape), topology, options=eplb.PlannerOptions(**options))
    assert len(looks) == 1


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x[x > 0],
        lambda x: x.tolist(),
        lambda x: x.unique(),
        lambda x: x.cpu(),
        lambda x: torch.tensor([1, 2], device=x.device),
    ],
    ids=["item", "bool", "mask", "tolist", "unique", "cpu", "data"],
)
def test_a_wait_amid_the_rounds_is_noticed(wait, seen, monkeypatch):
    def relieve(packings, *arguments):
        wait(packings.items)
        return refinement.relieve(packings, *arguments)

    monkeypatch.setattr(packing, "relieve", relieve)
    with pytest.raises(WaitError):
        test_a_plan_on_a_gpu_takes_one_look((4, 256), HIERARCHICAL, {}, seen)


def test_the_number_of_operations_is_bounded_and_does_not_depend_on_the_load():
    counts = set()
    for load in (random_load(58, 256), torch.zeros(58, 256), 1e5 / torch.arange(1, 257).expand(58, -1)):
        with Watch() as watch:
            eplb.plan(load, HIERARCHICAL)
        counts.add(watch.ops)
    assert len(counts) == 1
    assert counts.pop() <= MOST_OPS


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "layer 1, expert 7 is nan; 1 of 512"),
        (float("inf"), "layer 1, expert 7 is inf"),
        (-1.0, "layer 1, expert 7 is -1.0"),
        (1e308, "beyond float64"),
    ],
)
def test_a_bad_load_is_named_by_the_look(value, message):
    load = random_load(2, 256).double()
    load[1, 7] = value
    with pytest.raises(eplb.LoadError, match=message):
        eplb.plan(load, HIERARCHICAL)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("shape", "topology", "options"), CASES)
def test_cuda_itself_sees_no_wait_but_the_look(shape, topology, options, monkeypatch):
    load = random_load(*shape)
    on_host = eplb.plan(load, topology, options=eplb.PlannerOptions(**options))
    load = load.cuda()

    def allowed(numbers: torch.Tensor) -> list[float]:
        torch.cuda.set_sync_debug_mode("default")
        values = look(numbers)
        torch.cuda.set_sync_debug_mode("error")
        return values

    monkeypatch.setattr(single_look, "look", allowed)
    try:
        torch.cuda.set_sync_debug_mode("error")
        plan = eplb.plan(load, topology, options=eplb.PlannerOptions(**options))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(plan.placement.physical_to_logical.cpu(), on_host.placement.physical_to_logical)
