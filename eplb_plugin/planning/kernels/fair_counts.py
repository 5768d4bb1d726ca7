"""Fair tables: replica counts from which the tokens of a layer can be packed onto level ranks.

Of 16 ranks, 9 to 15 replicas are alike: some serve two ranks. So hot experts get counts at which each replica
serves a rank less. The counts of the hottest are enumerated, with LPT packing for each combination.
"""

from __future__ import annotations

import numpy as np

from .compiling import copy_into, jitted

__all__ = ["fair_counts", "pack"]

_TOPS = 3  # experts whose counts are enumerated
_SERVED = 4  # numbers of ranks that a replica of these may serve, from the least possible


@jitted
def fair_counts(unit, experts, num_ranks, width, per_rank, level, counts):
    """Choose the replica counts with the lowest peak after packing.

    Example: experts with 75 % and 10 % of the tokens on 16 ranks. 16 replicas serve one rank each, 75 % of
    the mean rank load. 8 replicas of the other one serve two, 20 % of it. The rest fits beside them.

    Args:
        unit: float64 [logical], tokens of an expert from one rank.
        experts: int64 [experts of the node], to be packed, the hottest first.
        num_ranks: ranks that send tokens.
        width: ranks to pack on.
        per_rank: slots of a rank.
        level: tokens that a rank may have: no replica of an enumerated expert gets more.
        counts: int64 [logical], written.

    Returns:
        The peak rank load in tokens; inf where no combination fits, and then `counts` is as it was.
    """
    tops = 0
    while tops < min(_TOPS, experts.shape[0]) and unit[experts[tops]] * num_ranks > level:
        tops += 1
    lowest = np.inf
    trial = counts.copy()
    slots = np.empty(width * per_rank, np.int64)
    for enumerated in range(tops + 1):
        others = experts[enumerated:]
        steps = _steps(unit, others, num_ranks, width, slots.shape[0] - experts.shape[0])
        for code in range(_SERVED**enumerated):
            trial[experts] = 1
            rest = code
            fits = True
            for top in range(enumerated):
                served = -(-num_ranks // width) + rest % _SERVED
                rest //= _SERVED
                trial[experts[top]] = -(-num_ranks // served)
                fits &= trial[experts[top]] <= width and served * unit[experts[top]] <= level
            spare = width * per_rank - trial[experts].sum()
            fits &= spare >= 0
            if not fits or not _spend(steps, others, width, spare, trial):
                continue
            peak = pack(unit, experts, trial, num_ranks, width, slots)
            if peak < lowest:
                lowest = peak
                copy_into(counts, trial)
    return lowest


@jitted
def _steps(unit, experts, num_ranks, width, spare):
    """Which experts get spare slots, and how many at once: the heaviest replicas in turn serve a rank less.

    Returns:
        int64 [steps, 2], expert and slots of each step.
    """
    steps = np.empty((spare, 2), np.int64)
    counts = np.ones(unit.shape[0], np.int64)
    for step in range(spare):
        heaviest, part, added = -1, 0.0, 0
        for expert in experts:
            if num_ranks * unit[expert] <= part:
                break  # the others are no hotter
            served = -(-num_ranks // counts[expert])
            if served > 1 and served * unit[expert] > part:
                wanted = -(-num_ranks // (served - 1))
                if wanted <= width:
                    heaviest, part, added = expert, served * unit[expert], wanted - counts[expert]
        if heaviest < 0:
            return steps[:step]
        counts[heaviest] += added
        steps[step] = heaviest, added
    return steps


@jitted
def _spend(steps, experts, width, spare, counts):
    """Spend spare slots by `steps`, and what is left on the hottest; whether all were spent."""
    for step in range(steps.shape[0]):
        added = min(steps[step, 1], spare)
        counts[steps[step, 0]] += added
        spare -= added
    for expert in experts:
        added = min(spare, width - counts[expert])
        counts[expert] += added
        spare -= added
    return spare == 0


@jitted
def pack(unit, experts, counts, num_ranks, width, slots):
    """LPT packing of replicas that serve floor or ceil of ranks / replicas.

    Args:
        unit, experts, num_ranks, width: as in `fair_counts`.
        counts: int64 [logical], over `experts` as many replicas as slots.
        slots: int64 [slots], written: the expert of each.

    Returns:
        The peak rank load in tokens.
    """
    num_slots = slots.shape[0]
    per_rank = num_slots // width
    part, owner = np.empty(num_slots), np.empty(num_slots, np.int64)
    last = 0
    for expert in experts:
        for replica in range(counts[expert]):
            served = num_ranks // counts[expert] + int(replica < num_ranks % counts[expert])
            part[last], owner[last] = served * unit[expert], expert
            last += 1
    level, used = np.zeros(width), np.zeros(width, np.int64)
    holds = np.zeros((unit.shape[0], width), np.bool_)
    for replica in np.argsort(-part, kind="mergesort"):
        expert = owner[replica]
        best, shared = -1, True
        for rank in range(width):
            if used[rank] == per_rank or (holds[expert, rank] and not shared):
                continue
            # Beside a replica of the same expert only where no other rank has a free slot.
            parted = shared and not holds[expert, rank]
            if best < 0 or parted or level[rank] < level[best]:
                best, shared = rank, bool(holds[expert, rank])
        slots[best * per_rank + used[best]] = expert
        used[best] += 1
        level[best] += part[replica]
        holds[expert, best] = True
    return level.max()
