"""Loads that are odd but valid: every plan of them is valid, and as balanced as theirs can be."""

from __future__ import annotations

import itertools

import pytest
import torch

import eplb_plugin as eplb

LAYERS = 2
# (nodes, ranks, slots, groups, experts)
SHAPES = [
    (1, 1, 1, 1, 1),
    (1, 4, 12, 1, 1),
    (1, 1, 8, 1, 8),
    (1, 8, 8, 1, 8),
    (1, 8, 8, 1, 3),
    (2, 4, 12, 8, 8),
    (2, 4, 12, 2, 10),
    (4, 4, 8, 8, 8),
    (2, 6, 12, 3, 9),
]


def _ramp(experts):
    return torch.arange(1, LAYERS * experts + 1, dtype=torch.float64).view(LAYERS, experts)


LOADS = {
    "nothing": lambda n: torch.zeros(LAYERS, n, dtype=torch.int64),
    "whole numbers that overflow when added": lambda n: torch.full((LAYERS, n), 2**62),
    "the largest whole number": lambda n: torch.full((LAYERS, n), 2**63 - 1),
    "huge beside small": lambda n: torch.where(_ramp(n) % 2 == 0, 2**62, 3),
    "float16 near its end": lambda n: torch.full((LAYERS, n), 65504.0, dtype=torch.float16),
    "bfloat16 near its end": lambda n: (_ramp(n) / (LAYERS * n) * 3e38).to(torch.bfloat16),
    "float32 near its end": lambda n: (_ramp(n) / (LAYERS * n) * 3e38).float(),
    "beyond float32": lambda n: _ramp(n) * 1e200,
    "denormal float32": lambda n: (_ramp(n) * 1e-42).float(),
    "below float32": lambda n: _ramp(n) * 1e-250,
    "all at one expert": lambda n: torch.nn.functional.pad(torch.full((LAYERS, 1), 10**6), (n - 1, 0)),
    "one layer idle": lambda n: _ramp(n) * torch.tensor([[0.0], [1.0]]),
    "over 600 orders of magnitude": lambda n: 10.0 ** (600 * _ramp(n) / (LAYERS * n) - 310).clamp(min=-290),
    "bytes": lambda n: _ramp(n).to(torch.uint8),
}
EVEN = [name for name in LOADS if name.startswith(("nothing", "whole", "the largest", "float16"))]


def check(load, topology, current, options):
    before = load.clone()
    made = eplb.plan(load, topology, current, options)
    assert torch.equal(load, before)
    made.placement.validate(topology)
    assert made.placement.physical_to_logical.shape == (LAYERS, topology.num_slots)
    # Replicas of an expert are apart wherever there are as many ranks.
    if current is None and not made.hierarchical:
        by_rank = made.placement.physical_to_logical.view(LAYERS, topology.num_ranks, -1)
        for layer, expert in itertools.product(range(LAYERS), range(made.placement.num_logical)):
            count = int(made.placement.replica_count[layer, expert])
            held = int((by_rank[layer] == expert).any(1).sum())
            assert held == min(count, topology.num_ranks) or made.shared_replicas > 0
    assert 0 < made.balancedness <= 1 + 1e-9
    assert made.balancedness == pytest.approx(eplb.balancedness(load, made.placement, topology))
    peak = eplb.rank_loads(load, made.placement, topology).amax(2).mean(0)
    assert torch.isfinite(made.lower_bound).all()
    assert (peak >= made.lower_bound * (1 - 1e-9)).all()
    return made


SPREAD = eplb.EnsembleOptions(objective="spread", num_candidates=4)
OPTIONS = {
    **{policy: eplb.PlannerOptions(policy=policy) for policy in ("adaptive", "ensemble", "greedy")},
    "spread": eplb.PlannerOptions(policy="ensemble", ensemble=SPREAD),
}


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("name", LOADS)
def test_odd_loads(name, kind):
    options = OPTIONS[kind]
    for nodes, ranks, slots, groups, experts in SHAPES:
        topology = eplb.Topology(num_nodes=nodes, num_ranks=ranks, num_slots=slots, num_groups=groups)
        current = eplb.Placement.default(LAYERS, experts, slots)
        for snapshots in (1, 20):
            load = LOADS[name](experts).expand(snapshots, -1, -1)
            made = check(load, topology, None, options)
            check(load, topology, current, options)
            if name in EVEN and slots % experts == 0:
                assert made.balancedness == pytest.approx(1)
            if kind != "greedy":
                plain = eplb.plan(load, topology, None, OPTIONS["greedy"])
                assert made.balancedness >= plain.balancedness - 0.05


def test_snapshots_as_different_as_can_be():
    topology = eplb.Topology(num_ranks=4, num_slots=12)
    load = torch.zeros(30, LAYERS, 8, dtype=torch.float64)
    for snapshot in range(30):
        load[snapshot, :, snapshot % 8] = 10.0 ** (snapshot - 15)
    for current in (None, eplb.Placement.default(LAYERS, 8, 12)):
        for options in OPTIONS.values():
            check(load, topology, current, options)


@pytest.mark.parametrize("policy", ["adaptive", "ensemble", "greedy"])
def test_two_thousand_slots_on_a_thousand_ranks(policy):
    topology = eplb.Topology(num_ranks=1024, num_slots=2048)
    load = torch.arange(LAYERS * 1500, dtype=torch.float64).view(LAYERS, 1500)
    options = eplb.PlannerOptions(policy=policy, ensemble=eplb.EnsembleOptions(num_candidates=1))
    made = eplb.plan(load, topology, None, options)
    made.placement.validate(topology)
    assert made.balancedness > 0.5
    grown = eplb.plan(load, topology, eplb.Placement.default(LAYERS, 1500, 2048), options)
    assert grown.balancedness > 0.45


def test_one_expert_in_two_thousand_slots():
    topology = eplb.Topology(num_ranks=1024, num_slots=2048)
    made = eplb.plan(torch.ones(1, 1), topology)
    assert made.balancedness == 1
    assert int(made.placement.replica_count) == 2048


def test_loads_that_cannot_be_added_up():
    load = torch.full((2, 8), 1.7e308, dtype=torch.float64)
    with pytest.raises(eplb.LoadError, match=r"1\.7e\+308: sums of 16 such values are beyond float64"):
        eplb.plan(load, eplb.Topology(num_ranks=4, num_slots=12))


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.eye(4).to_sparse(),
        lambda: torch.empty(4, 4, device="meta"),
        lambda: torch.quantize_per_tensor(torch.ones(4, 4), 0.1, 0, torch.quint8),
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        lambda: [[1.0] * 4],
        lambda: None,
    ],
)
def test_tensors_that_are_not_plain(make):
    topology = eplb.Topology(num_ranks=2, num_slots=4)
    for action in (
        lambda: eplb.plan(make(), topology),
        lambda: eplb.balanced_packing(make(), 2),
        lambda: eplb.rank_loads(make(), eplb.Placement.default(4, 4, 4), topology),
    ):
        with pytest.raises(eplb.LoadError):
            action()
