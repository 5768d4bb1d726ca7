"""The Triton kernels, interpreted: equal to the compiled split and slots. And they compile for a GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

import eplb_plugin as eplb
from eplb_plugin.dispatch.batch_split import BatchSplit
from eplb_plugin.dispatch.split_kernels import FINE_SWEEPS, MOST_FINE
from eplb_plugin.dispatch.tables import LayerTables, ReplicaTables
from eplb_plugin.dispatch.triton_batch import TritonSplit
from tests.dispatch.cases import worse_by_sweeps, worse_with_two_on_a_rank
from tests.dispatch.interpreter import interpreter
from tests.runtime.cases import random_placement

COSTS = (0, 1, 8, 32)

Interpreted = Callable[..., Any]


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Interpreted]:
    with interpreter() as call:
        yield call


def layer_tables(placement: eplb.Placement, topology: eplb.Topology, way: str) -> LayerTables:
    """The replicas of layer 0: as this package lists them, or padded as engines do; int64 or int32."""
    if way.startswith("padded"):
        table, count = placement.logical_to_physical[0], placement.replica_count[0]
        wide = torch.full((len(count), 1024), -1)
        wide[:, : table.shape[1]] = table
        listed = LayerTables(wide.view(-1), torch.arange(len(count)) * 1024, count)
    else:
        tables = ReplicaTables(placement, topology)
        listed = tables.of_layer(0)
    return LayerTables(*(table.to(torch.int32 if way.endswith("int32") else torch.int64) for table in listed))


TABLES = ("listed int64", "listed int32", "padded int64", "padded int32")


def small_layer(seed: int) -> tuple[eplb.Topology, eplb.Placement]:
    """A few ranks, even or not, some of them empty; any placement, also with two replicas on one rank."""
    draw = np.random.default_rng(seed)
    logical, ranks = int(draw.integers(1, 16)), int(draw.integers(1, 10))
    by_rank = draw.integers(0, 5, ranks)
    by_rank[draw.integers(ranks)] += max(0, logical - by_rank.sum())
    slots = int(by_rank.sum())
    topology = eplb.Topology(num_ranks=ranks, num_slots=slots, rank_slots=tuple(by_rank.tolist()))
    return topology, random_placement(1, logical, slots, seed)


def random_ids(seed: int, tokens: int, top_k: int, logical: int) -> torch.Tensor:
    """Skewed ids [tokens, top_k], some of them -1."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(tokens, top_k, generator=generator) ** 2 * (logical + 1)).long() - 1


def check_split(
    counts: torch.Tensor,
    placement: eplb.Placement,
    topology: eplb.Topology,
    expert_cost: int,
    way: str = "listed int64",
) -> int:
    """Compares the splits, and returns the dependent steps."""
    wanted = eplb.balance_batch(counts[None], placement, topology, expert_cost=expert_cost)[0]
    split = TritonSplit(topology, expert_cost=expert_cost, device="cpu")
    found = split.split(counts, layer_tables(placement, topology, way))
    assert found.tokens.tolist() == wanted.tolist()
    return int(found.steps)


def check_random_splits(seeds: range) -> None:
    for seed in seeds:
        topology, placement = small_layer(seed)
        high = (2, 20, 300, 5000)[seed % 4]
        draw = torch.Generator().manual_seed(seed)
        counts = (torch.rand(placement.num_logical, generator=draw) ** 3 * high).long()
        check_split(counts, placement, topology, COSTS[seed // 4 % 4], TABLES[seed % 4])


@pytest.mark.parametrize("first", range(0, 16, 8))
def test_the_split_is_that_of_balance_batch(interpreted: Interpreted, first: int) -> None:
    interpreted(check_random_splits, range(first, first + 8))


def hot_layer() -> tuple[eplb.Topology, eplb.Placement]:
    """Five experts with more replicas than a lane lists, one of them on each rank, and twice on one."""
    row = [0, 1, 3] * 9 + [0, 4, 2] * 9 + [0, 1, 2] + [0, 0, 5]
    placement = eplb.Placement(torch.tensor([row]), 6)
    assert placement.replica_count[0].tolist() == [21, 10, 10, 9, 9, 1]
    return eplb.Topology(num_ranks=20, num_slots=60), placement


def check_hot_split(expert_cost: int) -> int:
    topology, placement = hot_layer()
    return check_split(torch.tensor([700, 333, 250, 100, 40, 5]), placement, topology, expert_cost)


@pytest.mark.parametrize("expert_cost", [0, 32, 2**40])
def test_experts_of_many_replicas(interpreted: Interpreted, expert_cost: int) -> None:
    assert interpreted(check_hot_split, expert_cost) > 1


def check_hot_slots() -> None:
    topology, placement = hot_layer()
    batches = [random_ids(n, 20 + n, 2, 6) for n in range(20)]
    check_slots(topology, placement, batches, 0, "listed int64", [None] * 20, gathers=True)


def test_slots_of_experts_of_many_replicas(interpreted: Interpreted) -> None:
    interpreted(check_hot_slots)


def check_planned(expert_cost: int) -> int:
    topology, draw = eplb.Topology(num_ranks=32, num_slots=288), np.random.default_rng(3)
    load = draw.lognormal(0, 0.8, 256)
    placement = eplb.plan(torch.from_numpy(load)[None], topology).placement
    counts = torch.from_numpy(1 + draw.multinomial(4096 * 8, load / load.sum()))
    return check_split(counts, placement, topology, expert_cost), longest_chain(placement, topology)


def longest_chain(placement: eplb.Placement, topology: eplb.Topology) -> int:
    """Of the replicated experts in all sweeps, the most that have to wait for each other."""
    rank_of = [rank for rank in range(topology.num_ranks) for _ in range(topology.slots_by_rank[rank])]
    ranks = [{rank_of[s] for s in slots if s >= 0} for slots in placement.logical_to_physical[0].tolist()]
    last = [0] * topology.num_ranks
    for _ in range(FINE_SWEEPS + 1):
        for mine in (mine for mine in ranks if len(mine) > 1):
            step = 1 + max(last[rank] for rank in mine)
            for rank in mine:
                last[rank] = step
    return max(last)


def test_experts_without_a_common_rank_take_the_same_step(interpreted: Interpreted) -> None:
    steps, chain = interpreted(check_planned, 0)
    assert 1 < steps <= chain + 1
    assert chain < 68  # 23 replicated experts in 9 sweeps, one by one, are 207


def check_even_split() -> None:
    check_split(*worse_by_sweeps(), 4)
    check_split(*worse_with_two_on_a_rank(), 8)


def test_sweeps_that_end_above_the_even_split_are_dropped(interpreted: Interpreted) -> None:
    interpreted(check_even_split)


def check_large_counts() -> None:
    """Where parts of tokens would not fit 32 bits, the split is in whole tokens; and just below that."""
    topology, placement = hot_layer()
    share = torch.tensor([0.4, 0.2, 0.15, 0.1, 0.1, 0.05], dtype=torch.float64)
    for tokens in (MOST_FINE, 2**29):
        counts = (share * tokens).long()
        counts[0] += tokens - counts.sum()
        check_split(counts, placement, topology, 0)
        check_split(counts, placement, topology, MOST_FINE // topology.num_slots)


def test_large_batches(interpreted: Interpreted) -> None:
    interpreted(check_large_counts)


def check_slots(
    topology: eplb.Topology,
    placement: eplb.Placement,
    batches: list[torch.Tensor],
    expert_cost: int,
    way: str,
    padding: list[int | None],
    gathers: bool,
) -> None:
    """Each batch is on a rank of its own if `gathers`, else alone. Three of the ranks are compared."""
    replicas, logical = layer_tables(placement, topology, way), placement.num_logical
    rows = torch.zeros(len(batches), logical, dtype=replicas.counts.dtype)
    for row, (ids, tokens) in enumerate(zip(batches, padding, strict=True)):
        real = ids[:tokens].flatten()
        rows[row] = torch.bincount(real[(real >= 0) & (real < logical)], minlength=logical)

    for rank in sorted({0, len(batches) - 1} | ({1} if len(batches) > 1 else set())):
        ids, tokens = batches[rank], padding[rank]

        def gather(counts: torch.Tensor, rank: int = rank) -> torch.Tensor:
            assert counts.tolist() == rows[rank].tolist()
            return rows

        options: dict[str, Any] = {"expert_cost": expert_cost, "gather": gather if gathers else None}
        dtype = (torch.int32, torch.int64)[(rank + len(ids)) % 2]
        valid = torch.where((ids >= 0) & (ids < logical), ids, -1).to(dtype)
        bound = None if tokens is None else torch.tensor([tokens], dtype=dtype)
        wanted = BatchSplit(topology, rank=rank, **options).slots(valid, replicas, bound)
        split = TritonSplit(topology, rank=rank, device="cpu", **options)
        found = split.slots(ids.to(dtype), replicas, bound)
        assert found.dtype == dtype
        assert found.shape == ids.shape
        assert found.tolist() == wanted.tolist()


def check_replicated(seeds: range) -> None:
    for seed in seeds:
        topology, placement = small_layer(seed)
        top_k, tokens = seed % 3 + 1, (0, 1, 30, 200)[seed % 4]
        ids = random_ids(seed, tokens, top_k, placement.num_logical)
        ids = torch.where(torch.rand(ids.shape) < 0.03, placement.num_logical + 2, ids)  # no experts
        padding = (None, tokens // 2, tokens + 3, 0, None)[seed % 5]
        cost = COSTS[seed % 4]
        check_slots(topology, placement, [ids], cost, TABLES[seed % 4], [padding], gathers=False)


@pytest.mark.parametrize("first", range(0, 20, 5))
def test_slots_of_replicated_batches(interpreted: Interpreted, first: int) -> None:
    interpreted(check_replicated, range(first, first + 5))


def check_sharded(seeds: range) -> None:
    for seed in seeds:
        topology, placement = small_layer(seed)
        draw = np.random.default_rng(seed)
        sizes = draw.choice([0, 1, 9, 60], topology.num_ranks)
        batches = [random_ids(seed + n, int(size), 3, placement.num_logical) for n, size in enumerate(sizes)]
        padding = [int(size * 0.7) if seed % 2 else None for size in sizes]
        cost = COSTS[seed % 4]
        check_slots(topology, placement, batches, cost, TABLES[seed % 4], padding, gathers=True)


@pytest.mark.parametrize("seed", range(100, 106))
def test_slots_of_sharded_batches(interpreted: Interpreted, seed: int) -> None:
    interpreted(check_sharded, range(seed, seed + 1))


def check_large(gathers: bool) -> None:
    """More blocks, and more ranks below this one, than are summed at once."""
    from eplb_plugin.dispatch import triton_slot

    small = {name: triton_slot.tl.constexpr(size) for name, size in (("BLOCK", 32), ("CHUNK", 16))}
    topology, draw = eplb.Topology(num_ranks=40, num_slots=320), np.random.default_rng(5)
    load = draw.lognormal(0, 1.0, 256)
    placement = eplb.plan(torch.from_numpy(load)[None], topology).placement
    ids = [torch.from_numpy(draw.choice(256, (300, 8), p=load / load.sum())) for _ in range(40)]
    rows = torch.stack([torch.bincount(mine.flatten(), minlength=256) for mine in ids])
    options: dict[str, Any] = {"expert_cost": 8, "gather": (lambda _: rows) if gathers else None}
    split = TritonSplit(topology, rank=36, device="cpu", **options)
    replicas = layer_tables(placement, topology, "listed int64")
    with mock.patch.multiple(triton_slot, **small):
        found = split.slots(ids[36], replicas)
    assert found.tolist() == BatchSplit(topology, rank=36, **options).slots(ids[36], replicas).tolist()


@pytest.mark.parametrize("gathers", [False, True])
def test_slots_of_a_large_batch(interpreted: Interpreted, gathers: bool) -> None:
    interpreted(check_large, gathers)


def check_one_dimension_and_strides() -> None:
    topology, placement = small_layer(2)
    replicas, split = layer_tables(placement, topology, "listed int64"), TritonSplit(topology, device="cpu")
    ids = random_ids(2, 40, 2, placement.num_logical)
    turned = ids.t().contiguous().t()
    assert not turned.is_contiguous()
    assert split.slots(turned, replicas).tolist() == split.slots(ids, replicas).tolist()
    flat = BatchSplit(topology).slots(ids.flatten(), replicas)
    assert split.slots(ids.flatten(), replicas).tolist() == flat.tolist()


def test_ids_of_one_dimension_and_with_strides(interpreted: Interpreted) -> None:
    interpreted(check_one_dimension_and_strides)


def check_refusals() -> None:
    topology, placement = small_layer(2)
    replicas = layer_tables(placement, topology, "listed int64")
    gathered = []

    def gather(counts: torch.Tensor) -> torch.Tensor:
        gathered.append(counts)
        return counts[None]

    ids = random_ids(2, 40, 2, placement.num_logical)
    for batch in (ids, ids[:0]):  # also a rank without tokens
        with pytest.raises(eplb.LoadError, match=r"gave counts of shape \(1, \d+\), not of \d+ ranks"):
            TritonSplit(topology, gather=gather, device="cpu").slots(batch, replicas)
    split = TritonSplit(topology, gather=lambda n: gather(n).expand(topology.num_ranks, -1), device="cpu")
    split._most_ids = 79
    with pytest.raises(eplb.LoadError, match="80 entries; at most 79 are counted"):
        split.slots(ids, replicas)
    assert len(gathered) == 3


def test_what_does_not_fit_is_refused_after_the_message(interpreted: Interpreted) -> None:
    interpreted(check_refusals)


def test_without_triton_it_is_refused_at_construction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(eplb.ConfigError, match="on cuda needs Triton: "):
        BatchSplit(eplb.Topology(num_ranks=2, num_slots=4), device="cuda")


def test_an_old_triton_is_refused_at_construction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triton.__version__", "3.3.1+git1")
    with pytest.raises(eplb.ConfigError, match=r"needs Triton 3\.4 or later; 3\.3\.1\+git1 is installed"):
        BatchSplit(eplb.Topology(num_ranks=2, num_slots=4), device="cuda")


@pytest.mark.parametrize("size", [(256, 288, 32), (32, 40, 8), (64, 200, 100)], ids=str)
def test_the_kernels_compile_for_an_h100(size: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """What would be launched, down to the machine code; no GPU is needed for that."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kinds = {torch.int32: "*i32", torch.int64: "*i64"}
    compiled = []

    def compile_it(
        self: TritonSplit, kernel: Any, programs: int, args: dict[str, Any], num_warps: int
    ) -> None:
        signature, constants = {}, {}
        for at, parameter in enumerate(kernel.params):
            value = args[parameter.name]
            if parameter.is_constexpr:
                signature[parameter.name], constants[(at,)] = "constexpr", value
            else:
                signature[parameter.name] = kinds[value.dtype] if torch.is_tensor(value) else "i32"
        source = ASTSource(kernel, signature, constants)
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})
        assert made.asm["cubin"]
        assert made.metadata.shared <= 48 * 1024  # bytes a block may have without asking
        compiled.append(made.metadata.name)

    monkeypatch.setattr(TritonSplit, "_launch", compile_it)
    logical, slots, ranks = size
    topology = eplb.Topology(num_ranks=ranks, num_slots=slots)
    gathers, wide = ranks != 32, ranks == 8
    gather = (lambda counts: counts.expand(ranks, -1)) if gathers else None
    split = TritonSplit(topology, expert_cost=2**40 if wide else 32, gather=gather, device="cpu")
    replicas = layer_tables(random_placement(1, logical, slots, 0), topology, TABLES[ranks % 4])
    ids = random_ids(0, 40, 4, logical)
    split.slots(ids.int() if wide else ids, replicas, torch.tensor([30], dtype=torch.int32))
    assert compiled == ["count", "split", "assign"]
