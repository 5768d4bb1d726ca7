"""Fingerprints of expert weights: a moved expert whose bytes are wrong is noticed before it is used.

A fingerprint takes the bytes as little words `w` of 4 bytes, in blocks of 64 KiB, and adds up in wrapping
64-bit integers: `sum over blocks b of p[b] * (sum over words i of b of m[i] * w[i])`. The multipliers `m` and
`p` are fixed, odd and pseudo-random. A changed word changes the sum by `d * m[i] * p[b]`, 0 < |d| < 2**32.

Noticed for certain, of the bytes that are covered:
- any change within one word, a flipped byte for one: a product of odd numbers and `d` is not 0 modulo 2**64;
- two words of a block exchanged: no two multipliers agree modulo 2**33, which they would have to.

Everything else (rows or tensors exchanged, contents shifted, an old end, noise) only very probably. For
a change that was not made with these multipliers in mind, the odds to pass depend on the lowest bit that
differs in any word: below 2**-55 for bit 0, doubling with each bit, hence below 2**-24 where nothing but
the highest bits of several words changed (signs of float32, of each second bfloat16). The higher a bit,
the fewer bits of the products it reaches. Nothing here resists someone who wants a change to pass.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Literal

import numpy as np
import torch

from ...core.placement import Placement
from ...core.topology import Topology
from ..control.rank_group import RankGroup
from ..weights.expert_weights import ExpertWeights
from ..weights.staging import Arrival
from .checksum import sum_at, sum_rows
from .samples import sample, sample_experts

__all__ = ["Coverage", "ExpertFingerprints", "fingerprint_experts", "fingerprint_rows"]

Coverage = Literal["sampled", "all"]
"""Of each tensor: 1024 words spread over it (all of a small one), or every byte."""

_logger = logging.getLogger(__name__)

_AT_ONCE = 32  # experts
_TOLD = 5


def fingerprint_rows(rows: Sequence[torch.Tensor], coverage: Coverage) -> torch.Tensor:
    """One fingerprint for each row index, over the rows of all tensors; equal on every device and machine.

    "sampled" reads 4 KiB of a tensor: the first word, the last one, and one anywhere in each 1024th between.
    So it notices what changes a whole tensor, or all of a run of more than 1/512 of one; of single flipped
    bytes it notices the share that it reads: all in tensors up to 4 KiB, 1 in 3584 in one of 14 MiB.

    Args:
        rows: for each tensor, at least one, uint8 [n, bytes], on one device; rows may lie apart.
        coverage: which bytes count.

    Returns:
        int64 [n], on that device.
    """
    count, device = rows[0].shape[0], rows[0].device
    if device.type == "cpu":
        strides = np.array([row.stride(0) for row in rows])
        addresses = np.array([row.data_ptr() for row in rows]) + np.arange(count)[:, None] * strides
        found = sum_at(addresses, tuple(row.shape[1] for row in rows), sampled=coverage == "sampled")
        if found is not None:
            return torch.from_numpy(found)
    if count > _AT_ONCE:
        parts = ([row[first : first + _AT_ONCE] for row in rows] for first in range(0, count, _AT_ONCE))
        return torch.cat([fingerprint_rows(part, coverage) for part in parts])
    return sum_rows([torch.cat([sample(row) for row in rows], 1)] if coverage == "sampled" else rows)


def fingerprint_experts(experts: Sequence[Sequence[torch.Tensor]], coverage: Coverage) -> torch.Tensor:
    """One fingerprint for each expert, as `fingerprint_rows` gives, wherever the rows are.

    Args:
        experts: of each, at least one row: uint8 [bytes] of each of its tensors, all on one device.
        coverage: which bytes count.

    Returns:
        int64 [experts], on the CPU.
    """
    found = torch.zeros(len(experts), dtype=torch.int64)
    kinds: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, rows in enumerate(experts):
        kinds[tuple(row.numel() for row in rows)].append(index)
    others: list[int] = []
    for sizes, alike in kinds.items():
        if experts[alike[0]][0].device.type != "cpu":
            others += alike
            continue
        addresses = np.array([[row.data_ptr() for row in experts[index]] for index in alike])
        sums = sum_at(addresses, sizes, sampled=coverage == "sampled")
        if sums is None:
            others += alike
        else:
            found.numpy()[alike] = sums
    if coverage == "all":
        for index in others:
            found[index] = fingerprint_rows([row.unsqueeze(0) for row in experts[index]], coverage)[0]
        return found
    # What was sampled is small: many experts in one go cost little more than one.
    for alike, samples in sample_experts([experts[index] for index in others]):
        places = torch.tensor([others[index] for index in alike])
        found.index_copy_(0, places, sum_rows([samples]).cpu())
    return found


@dataclass(frozen=True, eq=False)
class ExpertFingerprints:
    """What each expert's weights were at the start; weights that an engine replaces later need new ones.

    Args:
        table: int64 [layers, logical], on the CPU.
        known: bool [layers, logical]; an expert that is not known is never wrong.
        coverage: which bytes count.
    """

    table: torch.Tensor
    known: torch.Tensor
    coverage: Coverage

    @classmethod
    def make(
        cls,
        weights: ExpertWeights,
        placement: Placement,
        topology: Topology,
        group: RankGroup,
        coverage: Coverage,
    ) -> ExpertFingerprints:
        """Take the fingerprints of what all slots hold now. All ranks call it together.

        Layers without tensors are not known, nor are experts whose replicas differ, which is said once.

        Raises:
            EplbError: on all ranks, when one of them could not read its weights.
        """
        mine = topology.slots_of_rank(group.rank)

        def fingerprint_all() -> torch.Tensor:
            found = torch.zeros(2, weights.num_layers, topology.num_slots, dtype=torch.int64)
            for layer, rows in enumerate(weights.rows):
                if rows:
                    found[0, layer, mine] = fingerprint_rows(rows, coverage).cpu()
                    found[1, layer, mine] = 1
            return found.to(group.device)

        found = group.sum(group.attempt("fingerprinting expert weights", fingerprint_all)).cpu()
        # Empty slots, -1, go to a column of their own.
        experts = placement.physical_to_logical.cpu() + 1
        of_expert = torch.zeros(2, *experts.shape[:1], placement.num_logical + 1, dtype=torch.int64)
        experts = experts.expand_as(found)
        lowest, highest = (
            of_expert.scatter_reduce(2, experts, found, how, include_self=False)[:, :, 1:]
            for how in ("amin", "amax")
        )
        alike = lowest[0] == highest[0]
        if group.rank == 0 and not bool(alike.all()):
            differ = (~alike).nonzero().tolist()
            _logger.warning(
                "%d of %d experts have replicas with different weights, so moves of these are not verified; "
                "the first (layer, expert): %s",
                len(differ),
                alike.numel(),
                ", ".join(str(tuple(pair)) for pair in differ[:_TOLD]),
            )
        return cls(lowest[0], alike & lowest[1].bool(), coverage)

    def wrong_arrivals(self, arrivals: Sequence[Arrival]) -> list[Arrival]:
        """Those that are not what they should be, as far as that is known.

        Args:
            arrivals: of any layers, on one device.
        """
        known, table = self.known.numpy(), self.table.numpy()
        some = [arrival for arrival in arrivals if known[arrival.layer, arrival.expert]]
        if not some:
            return []
        found = fingerprint_experts([arrival.rows for arrival in some], self.coverage).numpy()
        expected = table[[arrival.layer for arrival in some], [arrival.expert for arrival in some]]
        return list(compress(some, (found != expected).tolist()))

    def wrong_slots(
        self,
        weights: ExpertWeights,
        placement: Placement,
        topology: Topology,
        rank: int,
        layers: Sequence[int] | None = None,
    ) -> list[tuple[int, int]]:
        """(layer, slot) of the slots of this rank that do not hold the expert that `placement` says.

        Args:
            weights: of this rank.
            placement: what to expect.
            topology: gives the slots of a rank.
            rank: this rank.
            layers: those to look at; None is all.
        """
        slots = topology.slots_of_rank(rank)
        wrong = []
        for layer in range(weights.num_layers) if layers is None else layers:
            experts = placement.physical_to_logical[layer, slots.start : slots.stop].cpu()
            known = self.known[layer, experts] & (experts >= 0)
            if bool(known.any()):
                found = fingerprint_rows(weights.rows[layer], self.coverage).cpu()
                differs = known & (found != self.table[layer, experts])
                wrong += [(layer, slots.start + slot) for slot in differs.nonzero().flatten().tolist()]
        return wrong
