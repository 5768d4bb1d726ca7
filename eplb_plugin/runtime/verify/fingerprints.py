"""Fingerprints of expert weights: a moved expert whose bytes are wrong is noticed before it is used.

A fingerprint is the checksum of an expert's tensors (see `checksum`), with word factors `m[i]` and block
factors `p[b]`. A word changed by d, 0 < |d| < 2**32, changes the sum by `d * m[i] * p[b]`.

Certainly noticed, in the bytes that are covered:
- any change within one word, such as a flipped byte: `d` times odd numbers is not 0 modulo 2**64;
- two words of a block exchanged: no two word factors are equal modulo 2**33.

Very probably noticed: all other changes (rows or tensors exchanged, shifted content, an old end, noise). The
probability of a miss depends on the lowest bit that differs in any word: below 2**-55 for bit 0, doubled with
each bit. It is below 2**-24 if only the highest bits of several words changed, which reach fewest bits of the
products: signs of float32, or of each second bfloat16. A deliberate change can pass: this is no
cryptographic hash.
"""

from __future__ import annotations

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
from .checksum import checksum_at, checksum_rows, sample, sample_experts

__all__ = [
    "Coverage",
    "ExpertFingerprints",
    "describe_differing",
    "differing_replicas",
    "fingerprint_experts",
    "fingerprint_rows",
    "fingerprint_slots",
]

Coverage = Literal["sampled", "all"]
"""Bytes of each tensor that count: 1024 sampled words (all of a small tensor), or every byte."""

_AT_ONCE = 32  # experts
_NAMED = 5  # experts in a warning


def fingerprint_rows(rows: Sequence[torch.Tensor], coverage: Coverage) -> torch.Tensor:
    """Fingerprints of several experts in rows of the same tensors; equal on every device and machine.

    "sampled" reads 4 KiB of a tensor: the first word, the last, and a random one in each 1024th between. It
    notices changes of a whole tensor, or of a whole run of more than 1/512 of it. A single flipped
    byte is noticed with the share of bytes read. Tensors up to 4 KiB: always; 14 MiB: 1 in 3584 times.

    Args:
        rows: for each tensor, at least one, uint8 [experts, bytes], on one device; rows may lie apart.

    Returns:
        int64 [experts], on that device.
    """
    count, device = rows[0].shape[0], rows[0].device
    if device.type == "cpu":
        strides = np.array([row.stride(0) for row in rows])
        addresses = np.array([row.data_ptr() for row in rows]) + np.arange(count)[:, None] * strides
        found = checksum_at(addresses, tuple(row.shape[1] for row in rows), sampled=coverage == "sampled")
        if found is not None:
            return torch.from_numpy(found)
    if count > _AT_ONCE:
        parts = ([row[first : first + _AT_ONCE] for row in rows] for first in range(0, count, _AT_ONCE))
        return torch.cat([fingerprint_rows(part, coverage) for part in parts])
    return checksum_rows([torch.cat([sample(row) for row in rows], 1)] if coverage == "sampled" else rows)


def fingerprint_experts(experts: Sequence[Sequence[torch.Tensor]], coverage: Coverage) -> torch.Tensor:
    """The same of experts at arbitrary places, such as a staging buffer: int64 [experts] on the CPU.

    `experts`: of each, at least one row: uint8 [bytes] of each of its tensors, all on one device.
    """
    found = torch.zeros(len(experts), dtype=torch.int64)
    kinds: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, rows in enumerate(experts):
        kinds[tuple(row.numel() for row in rows)].append(index)
    others: list[int] = []
    for sizes, alike in kinds.items():
        sums = None
        if experts[alike[0]][0].device.type == "cpu":
            addresses = np.array([[row.data_ptr() for row in experts[index]] for index in alike])
            sums = checksum_at(addresses, sizes, sampled=coverage == "sampled")
        if sums is None:
            others += alike
        else:
            found.numpy()[alike] = sums
    if coverage == "all":
        for index in others:
            found[index] = fingerprint_rows([row.unsqueeze(0) for row in experts[index]], coverage)[0]
        return found
    # Sampled bytes are few: many experts in one call cost little more than one.
    for alike, samples in sample_experts([experts[index] for index in others]):
        places = torch.tensor([others[index] for index in alike])
        found.index_copy_(0, places, checksum_rows([samples]).cpu())
    return found


def fingerprint_slots(
    rows: Sequence[Sequence[torch.Tensor]], topology: Topology, group: RankGroup, coverage: Coverage
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fingerprints of the present content of all slots of all ranks. All ranks call it together.

    Args:
        rows: for each layer and tensor, uint8 [slots on this rank, bytes]; a layer may have no tensors.

    Returns:
        int64 [layers, slots], and bool [layers, slots]: whether the slot was read; both on the CPU.

    Raises:
        EplbError: on all ranks, if one of them cannot read its weights.
    """
    mine = topology.slots_of_rank(group.rank)

    def fingerprint_all() -> torch.Tensor:
        found = torch.zeros(2, len(rows), topology.num_slots, dtype=torch.int64)
        for layer, tensors in enumerate(rows):
            if tensors:
                found[0, layer, mine] = fingerprint_rows(tensors, coverage).cpu()
                found[1, layer, mine] = 1
        return found.to(group.device)

    found = group.sum(group.attempt("fingerprinting expert weights", fingerprint_all)).cpu()
    return found[0], found[1].bool()


def differing_replicas(fingerprints: torch.Tensor, ids: torch.Tensor, num_logical: int) -> torch.Tensor:
    """Experts whose replicas do not all have the same fingerprint.

    Args:
        fingerprints: int64 [layers, slots], on the CPU.
        ids: int64 [layers, slots], the expert in each slot; -1 for an empty one.

    Returns:
        bool [layers, logical].
    """
    lowest, highest = _extremes(fingerprints, ids, num_logical)
    return lowest != highest


def _extremes(
    of_slots: torch.Tensor, ids: torch.Tensor, num_logical: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lowest and highest value over the replicas of each expert, int64 [layers, logical]; 0 without any."""
    # Column 0 is for empty slots.
    nothing = torch.zeros(len(ids), num_logical + 1, dtype=torch.int64)
    low = nothing.scatter_reduce(1, ids + 1, of_slots, "amin", include_self=False)
    high = nothing.scatter_reduce(1, ids + 1, of_slots, "amax", include_self=False)
    return low[:, 1:], high[:, 1:]


def describe_differing(differs: torch.Tensor, numbers: Sequence[int] | None = None, *, also: str = "") -> str:
    """One line that names experts whose replicas differ.

    Args:
        differs: bool [layers, logical], not all false.
        numbers: of the layers; None is 0, 1 and so on.
        also: a further consequence.
    """
    pairs = differs.nonzero().tolist()
    first = [(layer if numbers is None else numbers[layer], expert) for layer, expert in pairs[:_NAMED]]
    return (
        f"{len(pairs)} of {differs.numel()} experts have replicas with different weights, so answers depend "
        f"on the replica that serves a token{also}; the first (layer, expert): {', '.join(map(str, first))}"
    )


@dataclass(frozen=True, eq=False)
class ExpertFingerprints:
    """The fingerprint of each expert at the start. Weights that an engine replaces later need new ones.

    Args:
        table: int64 [layers, logical], on the CPU.
        known: bool [layers, logical]; an expert without a known fingerprint is never wrong.
        coverage: bytes that count.
        differing: a line on experts whose replicas had different weights; empty without any.
    """

    table: torch.Tensor
    known: torch.Tensor
    coverage: Coverage
    differing: str = ""

    @classmethod
    def make(
        cls,
        weights: ExpertWeights,
        placement: Placement,
        topology: Topology,
        group: RankGroup,
        coverage: Coverage,
    ) -> ExpertFingerprints:
        """Fingerprint the present content of all slots. All ranks call it together.

        Unknown are layers without tensors, and experts whose replicas differ.

        Raises:
            EplbError: on all ranks, if one of them cannot read its weights.
        """
        found, read = fingerprint_slots(weights.rows, topology, group, coverage)
        ids, num_logical = placement.physical_to_logical.cpu(), placement.num_logical
        lowest, highest = _extremes(found, ids, num_logical)
        differs = lowest != highest
        told = ""
        if bool(differs.any()):
            told = describe_differing(differs, also=", and moves of these are not verified")
        known = _extremes(read.long(), ids, num_logical)[0].bool() & ~differs
        return cls(lowest, known, coverage, told)

    def wrong_arrivals(self, arrivals: Sequence[Arrival]) -> list[Arrival]:
        """The arrivals, all on one device, with a wrong fingerprint; unknown fingerprints match anything."""
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
        """(layer, slot) of the rank's slots without the fingerprint of the expert that `placement` has there.

        `layers`: to verify; None is all.
        """
        slots = topology.slots_of_rank(rank)
        wrong = []
        for layer in range(len(weights.rows)) if layers is None else layers:
            experts = placement.physical_to_logical[layer, slots.start : slots.stop].cpu()
            known = self.known[layer, experts] & (experts >= 0)
            if bool(known.any()):
                found = fingerprint_rows(weights.rows[layer], self.coverage).cpu()
                differs = known & (found != self.table[layer, experts])
                wrong += [(layer, slots.start + slot) for slot in differs.nonzero().flatten().tolist()]
        return wrong
