"""The ensemble packer: capacity, optimality on small cases, next to LPT, the same result everywhere."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eplb_plugin import EnsembleOptions, LoadError, TopologyError, balanced_packing
from eplb_plugin.core.load import to_exact
from eplb_plugin.core.splitmix import splitmix64, uniform
from eplb_plugin.planning.ensemble import pack_items
from eplb_plugin.planning.greedy import lpt_packing
from eplb_plugin.planning.replica_counts import count_replicas, replicate


def weights(*shape: int, seed: int = 0, sigma: float = 0.8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(*shape, dtype=torch.float64).log_normal_(0, sigma, generator=generator)


def pack_loads(weight: torch.Tensor, pack_index: torch.Tensor, num_packs: int) -> torch.Tensor:
    """float64 [X, packs], item by item."""
    loads = torch.zeros(len(weight), num_packs, dtype=torch.float64)
    for row, item in itertools.product(*map(range, weight.shape)):
        loads[row, pack_index[row, item]] += weight[row, item]
    return loads


def peak(weight: torch.Tensor, pack_index: torch.Tensor, num_packs: int) -> torch.Tensor:
    """The heaviest pack of each row, [X]."""
    return pack_loads(weight, pack_index, num_packs).amax(1)


def best_peak(weight: list[float], num_packs: int) -> float:
    """The optimum by trying every assignment with full packs."""
    capacity = len(weight) // num_packs

    def search(item: int, load: list[float], used: list[int], best: float) -> float:
        if item == len(weight):
            return min(best, max(load))
        for pack in range(num_packs):
            if used[pack] < capacity and load[pack] + weight[item] < best:
                load[pack] += weight[item]
                used[pack] += 1
                best = search(item + 1, load, used, best)
                load[pack] -= weight[item]
                used[pack] -= 1
            if used[pack] == 0:
                break  # empty packs are alike
        return best

    return search(0, [0.0] * num_packs, [0] * num_packs, float("inf"))


@given(
    rows=st.integers(1, 4),
    num_packs=st.integers(1, 6),
    capacity=st.integers(1, 5),
    seed=st.integers(0, 2**20),
    objective=st.sampled_from(["peak", "spread"]),
    candidates=st.sampled_from([1, 2, 8]),
)
@settings(max_examples=60, deadline=None)
def test_every_pack_is_full_and_lpt_is_not_better(rows, num_packs, capacity, seed, objective, candidates):
    weight = weights(rows, num_packs * capacity, seed=seed)
    options = EnsembleOptions(num_candidates=candidates, objective=objective)
    pack_index, rank_in_pack = balanced_packing(weight, num_packs, options)
    assert pack_index.dtype == rank_in_pack.dtype == torch.int64
    for row in range(rows):
        places = sorted(zip(pack_index[row].tolist(), rank_in_pack[row].tolist(), strict=True))
        assert places == list(itertools.product(range(num_packs), range(capacity)))
    lpt, _ = lpt_packing(weight, (capacity,) * num_packs)
    ours, theirs = pack_loads(weight, pack_index, num_packs), pack_loads(weight, lpt, num_packs)
    value = [x.amax(1) - (x.amin(1) if objective == "spread" else 0) for x in (ours, theirs)]
    assert (value[0] <= value[1] * (1 + 1e-9) + 1e-9).all()


@pytest.mark.parametrize(("num_packs", "capacity"), [(2, 2), (2, 4), (3, 2), (3, 3), (4, 2)])
def test_small_cases_reach_the_optimum(num_packs, capacity):
    weight = weights(25, num_packs * capacity, seed=num_packs * 10 + capacity)
    pack_index, _ = balanced_packing(weight, num_packs)
    optimum = [best_peak(row.tolist(), num_packs) for row in weight]
    assert peak(weight, pack_index, num_packs).tolist() == pytest.approx(optimum, rel=1e-9)


def all_pairs(items: list[int]) -> list[list[tuple[int, int]]]:
    """Every way to put items into packs of two."""
    if not items:
        return [[]]
    first, rest = items[0], items[1:]
    return [
        [(first, other), *pairs]
        for other in rest
        for pairs in all_pairs([item for item in rest if item != other])
    ]


@pytest.mark.parametrize("objective", ["peak", "spread"])
@pytest.mark.parametrize("num_packs", [2, 3, 4])
def test_pairs_of_one_load_reach_the_optimum_of_either_objective(num_packs, objective):
    # Whole numbers and a few ties.
    weight = weights(20, 2 * num_packs, seed=5).mul(4).round()
    index, _ = balanced_packing(weight, num_packs, EnsembleOptions(objective=objective))
    loads = pack_loads(weight, index, num_packs)
    least = loads.amin(1) if objective == "spread" else 0.0
    for row, value in zip(weight.tolist(), (loads.amax(1) - least).tolist(), strict=True):
        sums = [[row[a] + row[b] for a, b in pairs] for pairs in all_pairs(list(range(2 * num_packs)))]
        assert value == min(max(s) - (min(s) if objective == "spread" else 0.0) for s in sums)


def test_large_rows_come_close_to_the_mean():
    weight = weights(6, 288, sigma=0.3)
    pack_index, _ = balanced_packing(weight, 32)
    assert (peak(weight, pack_index, 32) <= weight.sum(1) / 32 * 1.001).all()


@pytest.mark.parametrize(("experts", "num_packs", "slots"), [(5, 4, 16), (12, 8, 16), (7, 3, 21)])
def test_replicas_of_an_expert_do_not_share_a_pack(experts, num_packs, slots):
    load = weights(30, experts, sigma=1.5)
    expert = replicate(load, slots, max_replicas=num_packs)
    share = (load / count_replicas(expert, experts)).gather(1, expert)
    pack, _ = pack_items(share, num_packs, expert, EnsembleOptions())
    for row in range(30):
        held = list(zip(pack[row].tolist(), expert[row].tolist(), strict=True))
        assert len(held) == len(set(held))


def test_the_same_row_packs_alike_in_any_batch_and_memory():
    weight = weights(9, 48, seed=3)
    options = EnsembleOptions(num_candidates=32)
    together, _ = balanced_packing(weight, 4, options)
    alone = torch.cat([balanced_packing(row[None], 4, options)[0] for row in weight])
    sliced, _ = balanced_packing(weight, 4, options.model_copy(update={"memory_mib": 1}))
    reordered, _ = balanced_packing(weight.flip(0), 4, options)
    assert torch.equal(together, alone)
    assert torch.equal(together, sliced)
    assert torch.equal(together, reordered.flip(0))


def test_the_seed_counts_and_the_global_random_state_does_not():
    weight = weights(4, 60, seed=5)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, _ = balanced_packing(weight, 5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(first, balanced_packing(weight, 5)[0])
    assert not torch.equal(first, balanced_packing(weight, 5, EnsembleOptions(seed=1))[0])


def test_splitmix_gives_the_published_numbers():
    """The first outputs of the reference implementation for the seed 1234567."""
    step = 0x9E3779B97F4A7C15 - (1 << 64)
    words = splitmix64(torch.arange(1, 6) * step + 1234567)
    assert [word % (1 << 64) for word in words.tolist()] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    numbers = uniform(splitmix64(torch.arange(100_000) * step))
    assert 0 <= float(numbers.min()) < 1e-3 < 1 - 1e-3 < float(numbers.max()) < 1
    assert abs(float(numbers.mean()) - 0.5) < 0.005


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32])
def test_any_dtype(dtype):
    weight = torch.tensor([[9, 7, 5, 3, 3, 1], [0, 0, 0, 0, 0, 0]]).to(dtype)
    pack_index, _ = balanced_packing(weight, 2)
    assert peak(weight.double(), pack_index, 2).tolist() == [15, 0]


@pytest.mark.parametrize("scale", [2.0**62, 1e300, 1e-300, 5e-324])
def test_any_scale(scale):
    weight = torch.tensor([[4.0, 3, 2, 1]], dtype=torch.float64) * scale
    pack_index, _ = balanced_packing(weight, 2)
    assert pack_index[0, 0] == pack_index[0, 3] != pack_index[0, 1]


def test_one_item_per_pack_and_one_pack():
    assert sorted(balanced_packing(weights(1, 4), 4)[0][0].tolist()) == [0, 1, 2, 3]
    pack_index, rank_in_pack = balanced_packing(weights(1, 4), 1)
    assert pack_index.tolist() == [[0] * 4]
    assert sorted(rank_in_pack[0].tolist()) == [0, 1, 2, 3]


def test_inputs_are_not_written_to():
    weight = weights(2, 12)
    copy = weight.clone()
    balanced_packing(weight, 3)
    assert torch.equal(weight, copy)


@pytest.mark.parametrize(
    ("weight", "num_packs", "error", "message"),
    [
        (torch.ones(2, 7), 2, TopologyError, "7 items are not divisible by num_packs=2"),
        (torch.ones(2, 6), 0, TopologyError, "num_packs=0"),
        (torch.tensor([[1.0, float("nan")]]), 2, LoadError, "expert 1 is nan"),
        (torch.tensor([[1.0, float("inf")]]), 2, LoadError, "expert 1 is inf"),
        (torch.tensor([[-1, 2]]), 2, LoadError, "expert 0 is -1.0; 1 of 2"),
        (torch.ones(4), 2, LoadError, r"shape \(4,\)"),
        (torch.ones(2, 2, 4), 2, LoadError, r"shape \(2, 2, 4\), not \[X, n\]"),
        (torch.ones(0, 4), 2, LoadError, r"shape \(0, 4\)"),
        (torch.ones(1, 4, dtype=torch.bool), 2, LoadError, "bool"),
        ([[1, 2]], 2, LoadError, "list"),
    ],
)
def test_bad_input_names_the_numbers(weight, num_packs, error, message):
    with pytest.raises(error, match=message):
        balanced_packing(weight, num_packs)


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 64), st.floats(1e-6, 1e12), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_exact_weights_are_whole_and_sum_without_rounding(snapshots, rows, items, scale, seed):
    exact = to_exact(weights(snapshots, rows, items, seed=seed) * scale)
    assert torch.equal(exact, exact.round())
    total = exact.sum(dim=(0, 2))
    assert (total < 2**50).all()
    for row in range(rows):
        assert sum(int(x) for x in exact[:, row].flatten().tolist()) == int(total[row])
