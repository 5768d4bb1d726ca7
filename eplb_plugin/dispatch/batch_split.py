"""One batch of one layer: from the experts of its tokens to their slots, by the split of the whole batch."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from ..core.errors import LoadError
from ..core.placement import Placement
from ..core.topology import Topology
from .balance_batch import balance_batch, checked_cost
from .tables import LayerTables
from .triton_batch import TritonSplit

__all__ = ["BatchSplit", "GatherCounts"]

_NOT_WANTED = np.zeros((0, 0), np.int64)

GatherCounts = Callable[[torch.Tensor], torch.Tensor]
"""From this rank's counts, [logical], to those of all ranks, [ranks, logical]. All ranks call it together."""


class BatchSplit:
    """Chooses the replicas of a batch so that the slowest rank ends as early as it can.

    Args:
        topology: ranks and slots.
        rank: this rank.
        expert_cost: least cost of a replica in use, in tokens.
        gather: where each rank has tokens of its own, gives the counts of all. None: every rank has all
            tokens of a batch, in the same order, and no message is needed.
        device: where expert ids arrive.

    Raises:
        LoadError: `expert_cost` is negative or not an integer. TopologyError: there is no such rank.
        ConfigError: on CUDA, Triton cannot be imported, or is too old.
    """

    def __init__(
        self,
        topology: Topology,
        *,
        rank: int = 0,
        expert_cost: int = 0,
        gather: GatherCounts | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.expert_cost = checked_cost(expert_cost)
        self.num_ranks = topology.num_ranks
        self.slots_by_rank = topology.slots_by_rank
        here = topology.slots_of_rank(rank)
        self._slots_here = here.stop - here.start
        self._gather = gather = gather if self.num_ranks > 1 else None
        self._row = 0 if gather is None else rank
        self._on_gpu: TritonSplit | None = None
        if torch.device(device).type == "cuda":
            self._on_gpu = TritonSplit(
                topology, rank=self._row, expert_cost=self.expert_cost, gather=gather, device=device
            )
        with torch.inference_mode(False):
            self._rank_of_slot = topology.rank_of_slot(device)
        self.device = self._rank_of_slot.device
        _compile(slots=self._on_gpu is None)

    def slots(
        self, expert_ids: torch.Tensor, replicas: LayerTables, num_tokens: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The slot of each token. With `gather`, all ranks call it together, also those without tokens.

        Args:
            expert_ids: int32 or int64 [tokens, top_k] or [tokens], logical experts; -1 stays -1.
            replicas: the replicas of the layer.
            num_tokens: integer [1] on the device: tokens behind the first `num_tokens` are padding. They
                are not counted, and spread evenly by their index. None: no padding.

        Returns:
            Shape and dtype of `expert_ids`. Over the ranks, every slot gets the tokens that `balance_batch`
            says.

        Raises:
            LoadError: an id is beyond the experts. On CUDA, where nothing waits, it becomes -1 instead; more
                ids than `TritonSplit` counts are refused there.
        """
        if self._on_gpu is not None:
            return self._on_gpu.slots(expert_ids, replicas, num_tokens)
        return self._slots_on_cpu(expert_ids, replicas, num_tokens)

    def slots_and_received(
        self, expert_ids: torch.Tensor, replicas: LayerTables
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The slot of each token, as `slots`, and the tokens that the slots of this rank get from each rank.

        Returns:
            slots: shape and dtype of `expert_ids`.
            received: int64 [ranks, slots on this rank], tokens. None where they are not known: without
                `gather`, and on CUDA, where the host does not wait for counts.
        """
        if self._on_gpu is not None or self._gather is None:
            return self.slots(expert_ids, replicas), None
        received = torch.zeros(self.num_ranks, self._slots_here, dtype=torch.int64)
        return self._slots_on_cpu(expert_ids, replicas, None, received), received

    def _slots_on_cpu(
        self,
        expert_ids: torch.Tensor,
        replicas: LayerTables,
        num_tokens: torch.Tensor | None,
        received: torch.Tensor | None = None,
    ) -> torch.Tensor:
        # Importing numba takes a while.
        from .split_kernels import choose_slots, count_tokens

        ids = expert_ids.contiguous().view(-1).numpy()
        top_k = expert_ids.shape[1] if expert_ids.dim() == 2 else 1
        counted = len(ids) if num_tokens is None else min(int(num_tokens) * top_k, len(ids))
        counts = torch.empty_like(replicas.counts)
        bad = count_tokens(ids[:counted], counts.numpy())
        gathered = counts.unsqueeze(0) if self._gather is None else self._gathered(counts, self._gather)
        # After the message: the other ranks wait for it.
        if bad != -1:
            raise LoadError(
                f"expert_ids holds {bad}; there are experts 0..{len(counts) - 1}, and -1 for none"
            )
        chosen = torch.empty_like(expert_ids, memory_format=torch.contiguous_format)
        possible = choose_slots(
            ids,
            counted,
            max(top_k, 1),
            counts.numpy(),
            gathered.numpy(),
            self._row,
            *(table.numpy() for table in replicas),
            self._rank_of_slot.numpy(),
            self.num_ranks,
            self.expert_cost,
            chosen.view(-1).numpy(),
            _NOT_WANTED if received is None else received.numpy(),
        )
        if not possible:
            raise LoadError(f"gather returned counts below 0, or others than its own for rank {self._row}")
        return chosen

    def _gathered(self, counts: torch.Tensor, gather: GatherCounts) -> torch.Tensor:
        """What `gather` returns, of the right shape and dtype."""
        gathered = gather(counts)
        wanted = (self.num_ranks, len(counts))
        if gathered.dtype != counts.dtype or gathered.shape != wanted:
            shape = tuple(gathered.shape)
            raise LoadError(f"gather returned {gathered.dtype} {shape}, not {counts.dtype} {wanted}")
        return gathered


def _compile(*, slots: bool) -> None:
    """Compile kernels for the CPU, or load them from the cache on disk, so that nothing waits for it later.

    `slots`: also those that choose the slots of a batch. The others measure dispatch for reports.
    """
    single = Placement(torch.tensor([[0]]), 1)
    balance_batch(torch.ones(1, 1, 1, dtype=torch.int64), single, Topology(num_ranks=1, num_slots=1))
    if not slots:
        return
    from .split_kernels import choose_slots, count_tokens

    zero, one = np.zeros(1, np.int64), np.ones(1, np.int64)
    for dtype in (np.int32, np.int64):
        ids = np.zeros(1, dtype)
        count_tokens(ids, np.zeros(1, np.int64))
        choose_slots(
            ids, 1, 1, one, one[None], 0, zero, zero, one, zero, 1, 0, np.zeros(1, dtype), _NOT_WANTED
        )
