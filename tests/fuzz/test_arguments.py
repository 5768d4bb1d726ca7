"""Any arguments of the public functions: they work or are refused by name, and stay as they were."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import eplb_plugin as eplb
from eplb_plugin.core.load import fold_steps
from eplb_plugin.runtime.load_window import LoadWindow

from .effort import effort
from .parsers import is_told

NUMBERS = st.integers(-2, 9) | st.sampled_from([True, None, "4", 2.0, math.nan])
SIZES = st.integers(-1, 8)
DTYPES = st.sampled_from(
    [torch.uint8, torch.int32, torch.int64, torch.float16, torch.float64, torch.bool, torch.complex64]
)
VALUES = st.sampled_from([0, 1, 3, -1, math.nan, math.inf, 2**62, 65504, 1e-40])


@st.composite
def tensors(draw, most_dims=4, values=VALUES):
    shape = draw(st.lists(st.integers(0, 4), max_size=most_dims))
    flat = draw(st.lists(values, min_size=math.prod(shape), max_size=math.prod(shape)))
    return torch.tensor(flat, dtype=torch.float64).view(shape).to(draw(DTYPES))


ANYTHING = tensors() | st.sampled_from([None, 3, "load", [[1]], torch.empty(0)])


@effort(150)
@given(nodes=NUMBERS, ranks=NUMBERS, slots=NUMBERS, groups=NUMBERS, experts=st.integers(-1, 9))
def test_topologies(nodes, ranks, slots, groups, experts):
    def make():
        topology = eplb.Topology(num_nodes=nodes, num_ranks=ranks, num_slots=slots, num_groups=groups)
        topology.check_experts(experts)
        topology.slots_of_rank(experts)

    is_told(make)


@effort(150)
@given(ids=ANYTHING, experts=st.integers(-1, 9), slots=SIZES, ranks=SIZES)
def test_placements(ids, experts, slots, ranks):
    def make():
        placement = eplb.Placement(ids, experts)
        table = placement.logical_to_physical
        assert int((table >= 0).sum()) == int((placement.physical_to_logical >= 0).sum())
        topology = eplb.Topology(num_ranks=ranks, num_slots=slots)
        eplb.plan_migration(placement, placement.with_layers(torch.tensor([0]), placement), topology)
        assert int(eplb.count_moves(placement, placement, topology).sum()) == 0

    is_told(make)


@effort(150)
@given(
    load=ANYTHING,
    current=st.none() | tensors(most_dims=2, values=st.integers(-1, 3)),
    slots=SIZES,
    ranks=SIZES,
    nodes=st.integers(0, 3),
    groups=st.integers(0, 3),
)
def test_plans(load, current, slots, ranks, nodes, groups):
    before = [x.clone() if isinstance(x, torch.Tensor) else x for x in (load, current)]

    def make():
        topology = eplb.Topology(num_nodes=nodes, num_ranks=ranks, num_slots=slots, num_groups=groups)
        made = eplb.plan(load, topology, current)
        assert 0 < made.balancedness <= 1 + 1e-9
        assert eplb.rank_loads(load, made.placement, topology).shape[2] == ranks

    is_told(make)
    for x, old in zip((load, current), before, strict=True):
        assert torch.equal(x, old) or bool(x.isnan().any()) if isinstance(x, torch.Tensor) else x is old


@effort(100)
@given(weight=ANYTHING, packs=st.integers(-1, 5))
def test_packing(weight, packs):
    def make():
        pack, place = eplb.balanced_packing(weight, packs, eplb.EnsembleOptions(num_candidates=2))
        items = weight.shape[-1]
        for row in (pack * (items // packs) + place).tolist():
            assert sorted(row) == list(range(items))

    is_told(make)


@effort(60)
@given(weight=ANYTHING, numbers=st.lists(st.integers(-1, 6), min_size=4, max_size=4))
def test_the_drop_in(weight, numbers):
    is_told(lambda: eplb.rebalance_experts(weight, *numbers))


@effort(150)
@given(
    sizes=st.lists(st.integers(0, 3), min_size=5, max_size=5),
    layer=st.integers(-2, 3),
    ids=tensors(most_dims=3, values=st.integers(-1, 3)),
    counts=ANYTHING,
    valid=st.none() | tensors(most_dims=2, values=st.integers(0, 1)),
)
def test_windows(sizes, layer, ids, counts, valid):
    layers, experts, interval, snapshots, history = sizes

    def make():
        window = LoadWindow(layers, experts, interval=interval, snapshots=snapshots, history=history)
        try:
            refused = is_told(lambda: window.record(layer, ids, valid))
        except (RuntimeError, IndexError):
            refused = True  # ids beyond the experts, as it says
            assert int(ids.max()) >= experts or int(ids.min()) < -1
        if refused:
            assert int(window._step.sum()) == 0
        window.step()
        taken = window.take().snapshots
        assert int(taken.sum()) >= 0
        window.push(taken)
        assert torch.equal(window.load(), taken)
        if isinstance(counts, torch.Tensor):
            is_told(lambda: window.record_counts(layer, counts))
            is_told(lambda: window.push(counts))

    is_told(make)


@pytest.mark.parametrize("snapshots", [1, 3, 100])
def test_steps_whose_sums_are_large(snapshots):
    folded = fold_steps(torch.full((7, 2, 3), 65504.0, dtype=torch.float16), snapshots)
    assert folded.shape[0] == min(snapshots, 7)
    assert float(folded.sum()) == 7 * 2 * 3 * 65504


OPTIONS = [eplb.EnsembleOptions, eplb.PlannerOptions, eplb.RebalancerOptions, eplb.MetricsOptions]
ODD = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.binary(max_size=4)
    | st.sampled_from([10**30, "null", "ensemble", "spread", object(), torch.ones(2), 1j]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@pytest.mark.parametrize("model", OPTIONS, ids=lambda model: model.__name__)
@effort(100)
@given(data=st.data())
def test_options(model, data):
    names = st.sampled_from(sorted(model.model_fields)) | st.text("aµ. ", max_size=6)
    values = data.draw(st.dictionaries(names, ODD, max_size=4))
    is_told(lambda: model(**values))
