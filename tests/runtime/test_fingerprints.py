"""Fingerprints against plain integers: what they notice, in every layout, and the table that ranks share."""

from __future__ import annotations

from dataclasses import dataclass
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import eplb_plugin as eplb
from eplb_plugin.runtime.control.rank_group import RankGroup
from eplb_plugin.runtime.verify import checksum, fingerprints
from eplb_plugin.runtime.verify.fingerprints import (
    Coverage,
    ExpertFingerprints,
    fingerprint_experts,
    fingerprint_rows,
)
from eplb_plugin.runtime.weights.expert_weights import ExpertWeights, byte_rows
from eplb_plugin.runtime.weights.staging import Arrival
from tests.processes import run_ranks
from tests.runtime.cases import fill, random_placement
from tests.runtime.test_transfer import TENSORS, make_weights

CPU = torch.device("cpu")
BLOCK = checksum.BLOCK * 4  # bytes
SIZES = [1, 3, 4, 5, 4096, 4097, 5003, BLOCK, BLOCK + 1, 3 * BLOCK + 7]
WHOLE_WORDS = [4, 4096, 4100, 0, BLOCK, BLOCK + 4, *[4096] * 20, 3 * BLOCK + 8]
COVERAGES: list[Coverage] = ["sampled", "all"]


def expected(row: list[bytes], coverage: Coverage) -> int:
    """The fingerprint of one expert, in Python's integers."""
    if coverage == "sampled":
        chosen = []
        for part in row:
            positions = checksum.sampled_bytes(len(part), CPU).tolist() if len(part) > 4096 else None
            chosen.append(part if positions is None else bytes(part[i] for i in positions))
        row = [b"".join(chosen)]
    blocks = [part[first : first + BLOCK] for part in row for first in range(0, len(part), BLOCK)]
    total = 0
    for p, block in zip(odd(2, len(blocks)), blocks, strict=True):
        words = [
            int.from_bytes(block[i : i + 4].ljust(4, b"\0"), "little", signed=True)
            for i in range(0, len(block), 4)
        ]
        total += p * sum(m * w for m, w in zip(odd(1, len(words)), words, strict=True))
    total %= 2**64
    return total - 2**64 if total >= 2**63 else total


def odd(stream: int, count: int) -> list[int]:
    """Multipliers by SplitMix64, from their definition."""
    numbers = []
    for index in range(1, count + 1):
        x = (index + (stream << 40)) * 0x9E3779B97F4A7C15 % 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        numbers.append(x ^ (x >> 31) | 1)
    return numbers


def random_rows(count: int, sizes: list[int], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(256, (count, size), generator=generator, dtype=torch.uint8) for size in sizes]


def single(rows: list[torch.Tensor], coverage: Coverage = "all") -> int:
    return int(fingerprint_rows(rows, coverage))


@pytest.mark.parametrize("sizes", [SIZES, WHOLE_WORDS])
@pytest.mark.parametrize("coverage", COVERAGES)
def test_it_is_what_plain_integers_give(coverage: Coverage, sizes: list[int]) -> None:
    rows = random_rows(3, sizes)
    found = fingerprint_rows(rows, coverage)
    assert found.dtype == torch.int64
    assert found.tolist() == [
        expected([bytes(row[i].tolist()) for row in rows], coverage) for i in range(rows[0].shape[0])
    ]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 4),
    st.lists(st.integers(0, 2300), min_size=1, max_size=4),
    st.sampled_from([1, 4]),
    st.sampled_from(COVERAGES),
    st.integers(0, 99),
)
def test_it_is_what_plain_integers_give_for_any_sizes(
    count: int, sizes: list[int], unit: int, coverage: Coverage, seed: int
) -> None:
    rows = random_rows(count, [unit * size for size in sizes], seed)
    wanted = [expected([bytes(row[i].tolist()) for row in rows], coverage) for i in range(count)]
    assert fingerprint_rows(rows, coverage).tolist() == wanted


@pytest.mark.parametrize("coverage", COVERAGES)
def test_compiled_and_on_tensors_it_is_the_same(coverage: Coverage) -> None:
    rows = [*random_rows(40, WHOLE_WORDS), random_rows(80, [5000])[0][::2]]
    experts = [[row[i] for row in rows] for i in range(40)]
    compiled = fingerprint_rows(rows, coverage), fingerprint_experts(experts, coverage)
    with mock.patch.object(fingerprints, "checksum_at", return_value=None):
        on_tensors = fingerprint_rows(rows, coverage), fingerprint_experts(experts, coverage)
    assert torch.equal(torch.stack(compiled), torch.stack(on_tensors))
    assert torch.equal(*compiled)


def test_compiled_sums_read_whole_words_alone() -> None:
    row = random_rows(1, [5008])[0][0]
    address, sizes = np.array([[row.data_ptr()]]), (5000,)
    for sampled in (False, True):
        assert checksum.checksum_at(address, sizes, sampled=sampled) is not None
        assert checksum.checksum_at(address + 2, sizes, sampled=sampled) is None
        assert checksum.checksum_at(address, (5001,), sampled=sampled) is None


@pytest.mark.parametrize("coverage", COVERAGES)
def test_layout_and_number_of_rows_do_not_matter(coverage: Coverage) -> None:
    rows = random_rows(70, [4, 33, 5001, BLOCK + 12, 0])
    found = fingerprint_rows(rows, coverage)
    one_by_one = torch.cat([fingerprint_rows([row[i : i + 1] for row in rows], coverage) for i in range(70)])
    assert torch.equal(found, one_by_one)
    apart = []
    for shift, row in enumerate(rows):
        whole = torch.empty(70, row.shape[1] + 2 * shift + 3, dtype=torch.uint8)
        apart.append(whole[:, shift : shift + row.shape[1]].copy_(row))
    assert torch.equal(found, fingerprint_rows(apart, coverage))
    # As a staging buffer holds them.
    buffer = torch.empty(200_000, dtype=torch.uint8)
    staged = [buffer[1 + 90_000 * (i % 2) :][: row.shape[1]].copy_(row[7]) for i, row in enumerate(rows[2:4])]
    assert single([row.unsqueeze(0) for row in staged], coverage) == single(
        [r[7:8] for r in rows[2:4]], coverage
    )
    with mock.patch.object(fingerprints, "_AT_ONCE", 1):
        assert torch.equal(found, fingerprint_rows(rows, coverage))
    assert fingerprint_rows([row[:0] for row in rows], coverage).tolist() == []


@pytest.mark.parametrize("coverage", COVERAGES)
def test_experts_in_one_go_are_what_each_is_alone(coverage: Coverage) -> None:
    shapes = [[4, 33, 5001], [BLOCK + 12], [9000, 0], [3]]
    rows = [random_rows(1, shapes[i % 4], i) for i in range(70)]
    found = fingerprint_experts([[row[0] for row in expert] for expert in rows], coverage)
    assert found.tolist() == [single(expert, coverage) for expert in rows]
    assert fingerprint_experts([], coverage).tolist() == []
    # In one buffer, as they arrive, first at places where no words can be read.
    buffer, used, staged = torch.empty(2_000_000, dtype=torch.uint8), 0, []
    for expert in rows:
        places = []
        for row in expert:
            places.append(buffer[used : used + row.numel()].copy_(row[0]))
            used += row.numel()
            used = used if used < 500_000 else -(-used // 16) * 16
        staged.append(places)
    assert torch.equal(fingerprint_experts(staged, coverage), found)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("coverage", COVERAGES)
def test_a_gpu_gives_the_same(coverage: Coverage) -> None:
    rows = random_rows(40, SIZES)
    found = fingerprint_rows([row.cuda() for row in rows], coverage)
    assert found.is_cuda
    assert torch.equal(found.cpu(), fingerprint_rows(rows, coverage))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_flipped_byte_passes(data: st.DataObject) -> None:
    rows = random_rows(1, [7, 4096, 3 * BLOCK + 5, 1])
    before = single(rows)
    row = data.draw(st.sampled_from(rows))
    place = data.draw(st.integers(0, row.shape[1] - 1))
    row[0, place] ^= data.draw(st.integers(1, 255))
    assert single(rows) != before


def test_the_highest_bit_of_any_word_reaches_the_sum() -> None:
    """It reaches fewest bits of it, but some, since all multipliers are odd."""
    for place in (0, 1, checksum.BLOCK, 2 * checksum.BLOCK + 77):
        row = torch.zeros(1, 3 * BLOCK, dtype=torch.uint8)
        row.view(torch.int32)[0, place] = -(2**31)
        total = single([row])
        assert total & -total == 2**31


def test_no_exchange_of_two_words_passes() -> None:
    """Their multipliers would have to agree in the lowest 33 bits, which no two of a block do."""
    of_word = checksum._factors(checksum.BLOCK, 1, CPU)
    assert (of_word % 2**33).unique().numel() == checksum.BLOCK
    (row,) = random_rows(1, [BLOCK])
    words = row.view(torch.int32)
    words[0, 5], words[0, 9000] = 0, -(2**31)
    before = single([row])
    words[0, 5], words[0, 9000] = -(2**31), 0
    assert single([row]) != before


@pytest.mark.parametrize("coverage", COVERAGES)
def test_what_goes_wrong_in_a_transfer_is_noticed(coverage: Coverage) -> None:
    size = 40 * BLOCK
    rows = random_rows(4, [size, size, 448, 4])
    right = fingerprint_rows(rows, coverage)
    assert right.unique().numel() == 4
    mine, other = ([row[i : i + 1] for row in rows] for i in (0, 1))
    wrong = {
        "another expert's scale": [mine[0], mine[1], other[2], mine[3]],
        "another expert's weights": [other[0], *mine[1:]],
        "another expert": other,
        "tensors exchanged": [mine[1], mine[0], *mine[2:]],
        "only the first half arrived": [
            torch.cat([mine[0][:, : size // 2], other[0][:, size // 2 :]], 1),
            *mine[1:],
        ],
        "the last half percent is missing": [
            torch.cat([mine[0][:, : -size // 200], torch.zeros(1, size // 200, dtype=torch.uint8)], 1),
            *mine[1:],
        ],
        "shifted by a byte": [mine[0].roll(1, 1), *mine[1:]],
        "shifted by a block": [mine[0].roll(BLOCK, 1), *mine[1:]],
        "blocks exchanged": [
            torch.cat([mine[0][:, BLOCK : 2 * BLOCK], mine[0][:, :BLOCK], mine[0][:, 2 * BLOCK :]], 1),
            *mine[1:],
        ],
        "zeros": [torch.zeros_like(mine[0]), *mine[1:]],
        "all signs flipped": [mine[0] ^ 0x80, *mine[1:]],
        "first byte": [mine[0].clone().index_fill_(1, torch.tensor([0]), int(mine[0][0, 0]) ^ 1), *mine[1:]],
        "last byte": [
            mine[0].clone().index_fill_(1, torch.tensor([size - 1]), int(mine[0][0, -1]) ^ 1),
            *mine[1:],
        ],
    }
    for name, parts in wrong.items():
        assert single(parts, coverage) != int(right[0]), name


@pytest.mark.parametrize("coverage", COVERAGES)
@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_tensors_of_every_dtype(coverage: Coverage) -> None:
    tensors = [torch.empty(3, *shape, dtype=dtype) for shape, dtype in TENSORS]
    fill(tensors, 0, [4, 4, 2])
    rows = [byte_rows(tensor, "t", 3) for tensor in tensors]
    found = fingerprint_rows(rows, coverage)
    assert found[0] == found[1] != found[2]
    for row in rows:
        row[1, -1] ^= 1
        assert fingerprint_rows(rows, coverage)[1] != found[1]
        row[1, -1] ^= 1


@dataclass(frozen=True)
class Seen:
    table: list[list[int]]
    known: list[list[bool]]
    wrong: list[tuple[int, int]]
    after: list[tuple[int, int]]
    differing: str


def share(rank: int, coverage: Coverage) -> Seen:
    """Four layers, one of them without tensors; in layer 1, one replica of expert 0 differs."""
    layers, logical, topology = 4, 5, eplb.Topology(num_ranks=3, num_slots=9)
    mine = topology.slots_of_rank(rank)
    placement = random_placement(layers, logical, 9, 3)
    weights = make_weights(3, layers)
    for layer in range(layers):
        fill(weights[layer], layer, placement.physical_to_logical[layer, mine].tolist())
    weights[2] = []
    twin = int(placement.logical_to_physical[1, twice(placement)].max())
    if mine.start <= twin < mine.stop:
        byte_rows(weights[1][2], "t", 3)[twin - mine.start, 7] ^= 1
    registered, group = ExpertWeights(weights, topology), RankGroup()

    prints = ExpertFingerprints.make(registered, placement, topology, group, coverage)

    expert = int(placement.physical_to_logical[3, mine.start])
    rows = [row[0] for row in registered.rows[3]]
    other = (expert + 1) % logical
    right, wrong_one = Arrival(3, expert, 0, rows), Arrival(3, other, 0, rows)
    unknown = [Arrival(1, twice(placement), 0, rows), Arrival(2, expert, 0, [])]
    assert prints.wrong_arrivals([right, wrong_one, *unknown, right, wrong_one]) == [wrong_one] * 2
    assert prints.wrong_arrivals(unknown) == []

    wrong = prints.wrong_slots(registered, placement, topology, rank)
    if rank == 1:
        registered.rows[0][0][1, 2] ^= 4
        registered.rows[3][0][2] ^= 255
    after = prints.wrong_slots(registered, placement, topology, rank)
    assert prints.wrong_slots(registered, placement, topology, rank, [1, 2]) == []
    return Seen(prints.table.tolist(), prints.known.tolist(), wrong, after, prints.differing)


def twice(placement: eplb.Placement) -> int:
    """An expert of layer 1 with several replicas."""
    return int(placement.replica_count[1].argmax())


@pytest.mark.parametrize("coverage", COVERAGES)
def test_all_ranks_share_one_table(coverage: Coverage) -> None:
    seen = run_ranks(share, 3, coverage)
    placement = random_placement(4, 5, 9, 3)
    assert all(rank.table == seen[0].table and rank.known == seen[0].known for rank in seen)
    unknown = {(layer, e) for layer in range(4) for e in range(5) if not seen[0].known[layer][e]}
    assert unknown == {(1, twice(placement)), *((2, expert) for expert in range(5))}
    assert [rank.wrong for rank in seen] == [[], [], []]
    assert [rank.after for rank in seen] == [[], [(0, 4), (3, 5)], []]
    said = seen[0].differing
    assert said.startswith("1 of 20 experts have replicas with different weights")
    assert said.endswith(f"(layer, expert): (1, {twice(placement)})")
    assert [rank.differing for rank in seen] == [said] * 3


def test_empty_slots_are_passed_over() -> None:
    topology = eplb.Topology(num_ranks=1, num_slots=5)
    weights = ExpertWeights([[torch.arange(5.0)]], topology)
    placement = eplb.Placement(torch.tensor([[2, -1, 0, 1, -1]]), 3)
    prints = ExpertFingerprints.make(weights, placement, topology, RankGroup(alone=True), "all")
    assert prints.known.all()
    assert prints.wrong_slots(weights, placement, topology, 0) == []
    moved = eplb.Placement(torch.tensor([[2, 1, 0, -1, 1]]), 3)
    assert prints.wrong_slots(weights, moved, topology, 0) == [(0, 1), (0, 4)]


def fail_to_read(rank: int) -> str:
    topology = eplb.Topology(num_ranks=2, num_slots=4)
    weights = ExpertWeights([[torch.zeros(2, 8)]], topology)
    placement = eplb.Placement.default(1, 4, 4)
    broken = mock.patch.object(fingerprints, "fingerprint_rows", side_effect=MemoryError("no bytes left"))
    if rank == 1:
        broken.start()
    with pytest.raises(eplb.EplbError, match="rank 1: MemoryError: no bytes left") as caught:
        ExpertFingerprints.make(weights, placement, topology, RankGroup(), "all")
    broken.stop()
    return str(caught.value)


def test_a_rank_that_cannot_read_its_weights_fails_on_all() -> None:
    assert len(set(run_ranks(fail_to_read, 2))) == 1
