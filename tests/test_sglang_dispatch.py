"""SGLang's dispatch without SGLang: what it refuses, and which slots tokens get at its two seams."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import eplb_plugin as eplb
from eplb_plugin.integration.sglang import dispatch
from eplb_plugin.integration.sglang.dispatch import (
    LayerSolvers,
    ServedSplit,
    check_dispatch,
    serve,
    to_slots,
)
from tests.processes import run_ranks

LAYERS, LOGICAL, SLOTS, TOP_K = 3, 8, 14, 3
CPU = torch.device("cpu")


def placement_of(seed):
    """Hot experts have two or three replicas on two ranks, one of them twice on the same rank."""
    generator = torch.Generator().manual_seed(seed)
    spare = torch.randint(LOGICAL, (LAYERS, SLOTS - LOGICAL), generator=generator)
    rows = torch.cat([torch.arange(LOGICAL).expand(LAYERS, -1), spare], 1)
    return eplb.Placement(rows.gather(1, torch.rand(rows.shape, generator=generator).argsort(1)), LOGICAL)


def batch(tokens, seed, dtype=torch.int32):
    generator = torch.Generator().manual_seed(seed)
    heat = torch.rand(LOGICAL, generator=generator) ** 3 + 0.02
    return torch.multinomial(heat.expand(tokens or 1, -1), TOP_K, generator=generator)[:tokens].to(dtype)


def info_of(placement, layer, algorithm="dynamic"):
    """What SGLang hands over: rows of the replicas of all experts, padded with -1 to the number of slots."""
    rows = torch.full((LOGICAL, SLOTS), -1)
    listed = placement.logical_to_physical[layer]
    rows[:, : listed.shape[1]] = listed
    return SimpleNamespace(
        ep_dispatch_algorithm=algorithm,
        partial_logical_to_all_physical_map=rows,
        partial_logical_to_all_physical_map_num_valid=placement.replica_count[layer],
    )


def topology_of(ranks):
    return eplb.Topology(num_ranks=ranks, num_slots=SLOTS)


def serving(ranks, rank=0, *, cost=0, gather=None, num_tokens=lambda: None):
    serve(
        ServedSplit(
            topology_of(ranks),
            LOGICAL,
            rank=rank,
            expert_cost=lambda: cost,
            num_tokens=num_tokens,
            gather=gather,
            device=CPU,
        )
    )


@pytest.fixture(autouse=True)
def _nothing_served():
    yield
    dispatch._served.clear()


def loads(ids, placement, layer, ranks, cost):
    counts = torch.zeros(LAYERS, LOGICAL, dtype=torch.int64)
    counts[layer] = torch.bincount(ids[ids >= 0].flatten(), minlength=LOGICAL)
    return eplb.balance_batch(counts, placement, topology_of(ranks), expert_cost=cost)[layer]


def check(slots, ids, placement, layer, ranks, cost):
    """Each token is on a slot of its expert, and the slots get what `balance_batch` says."""
    assert slots.shape == ids.shape
    assert slots.dtype == ids.dtype
    assert torch.equal(slots < 0, ids < 0)
    held = placement.physical_to_logical[layer][slots[ids >= 0].long()]
    assert torch.equal(held, ids[ids >= 0].long())
    got = torch.bincount(slots[slots >= 0].flatten().long(), minlength=SLOTS)
    assert torch.equal(got, loads(ids, placement, layer, ranks, cost))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("cost", [0, 4])
@pytest.mark.parametrize("tokens", [0, 1, 7, 64])
def test_all_tokens_on_every_rank(tokens, cost, dtype):
    placement = placement_of(0)
    serving(2, cost=cost)
    for layer in range(LAYERS):
        ids = batch(tokens, layer, dtype)
        ids[1::5, 2] = -1
        check(to_slots(ids, info_of(placement, layer)), ids, placement, layer, 2, cost)
    # Columns of shared experts are cut off: the others are not contiguous.
    ids = batch(tokens, 9, dtype)
    wider = torch.cat([ids, ids[:, :1]], 1)[:, :TOP_K]
    assert torch.equal(to_slots(wider, info_of(placement, 0)), to_slots(ids, info_of(placement, 0)))


def test_nothing_to_map():
    ids = batch(4, 0)
    assert to_slots(ids, None) is ids


def test_padding_changes_no_token():
    """Rows behind the batch hold whatever was there, on each rank its own."""
    placement, bound = placement_of(1), torch.tensor([20], dtype=torch.int32)
    ids = batch(20, 0)
    serving(2, cost=2)
    alone = to_slots(ids, info_of(placement, 1))
    serving(2, cost=2, num_tokens=lambda: bound)
    for seed in range(4):
        padded = to_slots(torch.cat([ids, batch(12, 50 + seed)]), info_of(placement, 1))
        assert torch.equal(padded[:20], alone)
    # The bound is read anew for each batch.
    bound[0] = 5
    check(to_slots(ids, info_of(placement, 1))[:5], ids[:5], placement, 1, 2, 2)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_within_compiled_code(backend):
    """As SGLang maps: within `torch.compile`, before padding is masked. No graph break, one trace."""
    placement = placement_of(2)
    serving(2)
    traces = []

    def count(graph, inputs):
        traces.append(graph)
        return graph if backend == "eager" else torch._dynamo.lookup_backend(backend)(graph, inputs)

    def postprocess(ids, info, bound):
        slots = to_slots(ids, info)
        slots.masked_fill_((torch.arange(slots.shape[0]) >= bound)[:, None], -1)
        return slots

    torch._dynamo.reset()
    compiled = torch.compile(postprocess, dynamic=True, fullgraph=True, backend=count)
    with torch.inference_mode():
        for tokens in (16, 7, 33):
            for layer in range(LAYERS):
                ids, info = batch(tokens, tokens + layer), info_of(placement, layer)
                bound = torch.tensor(tokens - 2)
                assert torch.equal(compiled(ids, info, bound), postprocess(ids, info, bound))
    assert len(traces) == 1


def test_the_cost_is_asked_for_once_and_at_the_first_batch():
    asked = []
    split = ServedSplit(
        topology_of(2),
        LOGICAL,
        rank=0,
        expert_cost=lambda: asked.append(1) or 3,
        num_tokens=lambda: None,
        gather=None,
        device=CPU,
    )
    serve(split)
    assert not asked
    for _ in range(3):
        to_slots(batch(9, 0), info_of(placement_of(0), 0))
    assert asked == [1]


def test_slots_before_the_dispatch_is_set_up():
    with pytest.raises(eplb.EplbError, match="was not set up in this process"):
        to_slots(batch(4, 0), info_of(placement_of(0), 0))


def test_slots_that_no_solver_was_asked_for():
    serving(2)
    with pytest.raises(eplb.EplbError, match=r"asked no solver for the slots of \(4, 3\) expert ids"):
        to_slots(batch(4, 0), info_of(placement_of(0), 0, "lp"))


def solve_on_each_rank(rank, cost):
    """Two placements, three steps each; at some, a rank has no tokens. Its slots and ids."""
    world, seen = dist.get_world_size(), []

    def gather(counts):
        rows = [torch.empty_like(counts) for _ in range(world)]
        dist.all_gather(rows, counts)
        return torch.stack(rows)

    serving(world, rank, cost=cost, gather=gather)
    solvers = None
    for seed in range(2):
        current = placement_of(seed).physical_to_logical
        if solvers is None:
            solvers = LayerSolvers(current, LOGICAL, topology_of(world), CPU)
        else:
            solvers.update(current)
        for step in range(3):
            for layer, solver in enumerate(solvers.solvers):
                ids = batch(0 if (step + rank) % 3 == 0 else 10 + 5 * rank, 7 * step + rank)
                slots = to_slots(ids, info_of(placement_of(0), layer, "lp"), solver.solve(ids))
                seen.append((seed, layer, ids.tolist(), slots.tolist()))
    return seen


@pytest.mark.parametrize("cost", [0, 3])
def test_own_tokens_on_each_rank(cost):
    ranks = run_ranks(solve_on_each_rank, 2, cost)
    for (seed, layer, *first), (_, _, *second) in zip(*ranks, strict=True):
        ids, slots = (torch.tensor(a + b, dtype=torch.int32) for a, b in zip(first, second, strict=True))
        check(slots.view(-1, TOP_K), ids.view(-1, TOP_K), placement_of(seed), layer, 2, cost)


def test_another_map_is_written_to_the_same_addresses():
    old = placement_of(0).physical_to_logical
    solvers = LayerSolvers(old, LOGICAL, topology_of(2), CPU)
    addresses = [[table.data_ptr() for table in solver._replicas] for solver in solvers.solvers]
    assert solvers.update(old.clone()) == []
    new = old.clone()
    new[1] = placement_of(5).physical_to_logical[1]
    with torch.inference_mode():  # a rebalance is within a forward pass
        assert solvers.update(new) == [1]
    assert [[table.data_ptr() for table in solver._replicas] for solver in solvers.solvers] == addresses
    fresh = LayerSolvers(new, LOGICAL, topology_of(2), CPU)
    for ours, theirs in zip(solvers.solvers, fresh.solvers, strict=True):
        for table, expected in zip(ours._replicas, theirs._replicas, strict=True):
            assert torch.equal(table, expected)


def test_a_map_that_does_not_fit_changes_nothing():
    old = placement_of(0).physical_to_logical
    solvers = LayerSolvers(old, LOGICAL, topology_of(2), CPU)
    missing = old.clone()
    missing[2][missing[2] == 3] = 4
    for wrong in (missing, old[:, :-1], old[:2]):
        with pytest.raises(eplb.PlacementError):
            solvers.update(wrong)
    assert solvers.update(old) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("none", "static", "cuda", True), "none: --ep-dispatch-algorithm is 'static'; give dynamic"),
        (("none", "fake", "cpu", False), "none: --ep-dispatch-algorithm is 'fake'; give dynamic"),
        (("none", "lp", "cuda", True), "none: --ep-dispatch-algorithm is 'lp'; give dynamic"),
        (("none", None, "npu", False), "no kernels for --device npu"),
        (("deepep", None, "cuda", True), "deepep: --ep-dispatch-algorithm is None; give lp"),
        (("deepep", "static", "cuda", True), "deepep: --ep-dispatch-algorithm is 'static'; give lp"),
        (("deepep", "lp", "cuda", False), "deepep needs NVIDIA GPUs"),
        (("megamoe", "lp", "cuda", True), "megamoe: its ranks do not ask for slots together; there are none"),
        (("customized", "lp", "cuda", True), "customized: its ranks do not ask"),
    ],
)
def test_what_cannot_be_balanced_is_refused(arguments, message):
    with pytest.raises(eplb.ConfigError, match=message):
        check_dispatch(*arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ("none", None, "cpu", False),
        ("none", "dynamic", "cuda", True),
        ("none", "dynamic", "cuda", False),
        ("deepep", "lp", "cuda", True),
        ("flashinfer", "lp", "cuda", True),
    ],
)
def test_what_can_be_balanced(arguments):
    check_dispatch(*arguments)
