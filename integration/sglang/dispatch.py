"""Dispatch `balanced` in SGLang: where experts become slots, the batch is split as a whole.

Without an all-to-all backend every rank has all tokens, and SGLang's mapping is replaced. With one, each rank
has its own tokens: objects of ours in place of SGLang's solvers exchange the counts and choose the slots.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch

from ...core.errors import ConfigError, EplbError
from ...core.placement import Placement
from ...core.topology import Topology
from ...dispatch.batch_split import BatchSplit, GatherCounts
from ...dispatch.tables import LayerTables, ReplicaTables

__all__ = ["LayerSolver", "LayerSolvers", "ServedSplit", "check_dispatch", "serve", "to_slots"]

NO_BACKEND = "none"
"""SGLang's name for serving without an all-to-all backend."""

# With `megamoe` a rank without tokens never asks a solver, and its gate maps experts to slots itself.
_SHARDED = ("deepep", "deepep_v2", "mooncake", "nixl", "flashinfer", "pplx")

_SOLVER = "lp"


def check_dispatch(backend: str, algorithm: str | None, device: str, on_cuda: bool) -> None:
    """Refuse arguments with which SGLang's batches cannot be split as a whole.

    Args:
        backend: value of `--moe-a2a-backend`.
        algorithm: value of `--ep-dispatch-algorithm`; None: SGLang's default.
        device: value of `--device`.
        on_cuda: whether there are NVIDIA GPUs.

    Raises:
        ConfigError: names the arguments and what would be right.
    """
    given = f"dispatch=balanced with --moe-a2a-backend {backend}"
    if device not in ("cuda", "cpu"):
        raise ConfigError(f"dispatch=balanced has no kernels for --device {device}, but for cuda and cpu")
    if backend == NO_BACKEND:
        if algorithm not in (None, "dynamic"):
            raise ConfigError(
                f"{given}: --ep-dispatch-algorithm is {algorithm!r}; give dynamic, the default, which is "
                "equal on all ranks"
            )
        return
    if backend not in _SHARDED:
        raise ConfigError(
            f"{given}: its ranks do not ask for slots together; there are {NO_BACKEND}, {', '.join(_SHARDED)}"
        )
    if not on_cuda:
        raise ConfigError(f"{given} needs NVIDIA GPUs: SGLang asks a solver on no other device")
    if algorithm != _SOLVER:
        raise ConfigError(
            f"{given}: --ep-dispatch-algorithm is {algorithm!r}; give {_SOLVER}, with which SGLang asks for "
            "the slots of a batch outside of compiled code"
        )


class ServedSplit:
    """The split of all layers in this process: they share ranks, slots and cost.

    Args:
        topology: ranks and slots.
        num_logical: logical experts per layer.
        rank: this rank among those that share the experts.
        expert_cost: gives the least cost of a replica in use, in tokens. Called at the first batch, when the
            weights are loaded.
        num_tokens: gives the number of tokens before the padding of the batch, integer [1] on the device, or
            None where no row is padding.
        gather: gives the counts of all ranks; None where every rank has all tokens.
        device: where expert ids arrive.

    Attributes:
        first_of_row: int64 [logical], index of each expert's first slot in SGLang's map, flattened.
    """

    def __init__(
        self,
        topology: Topology,
        num_logical: int,
        *,
        rank: int,
        expert_cost: Callable[[], int],
        num_tokens: Callable[[], torch.Tensor | None],
        gather: GatherCounts | None,
        device: torch.device,
    ) -> None:
        self._topology, self._rank, self._device = topology, rank, device
        self._expert_cost, self._num_tokens, self._gather = expert_cost, num_tokens, gather
        with torch.inference_mode(False):
            self.first_of_row = torch.arange(num_logical, device=device) * topology.num_slots

    @cached_property
    def _split(self) -> BatchSplit:
        return BatchSplit(
            self._topology,
            rank=self._rank,
            expert_cost=self._expert_cost(),
            gather=self._gather,
            device=self._device,
        )

    @property
    def expert_cost(self) -> int:
        """Least cost of a replica in use, in tokens."""
        return self._split.expert_cost

    def slots(self, expert_ids: torch.Tensor, replicas: LayerTables) -> torch.Tensor:
        """The slot of each token, see `BatchSplit.slots`. Padding has no part in the split."""
        return self._split.slots(expert_ids, replicas, self._num_tokens())


# An operator takes tensors and numbers only: the split that it asks is the latest one of this process.
_served: list[ServedSplit] = []


def serve(split: ServedSplit) -> None:
    """Have `split` answer in this process from now on."""
    _served[:] = [split]


def _in_force() -> ServedSplit:
    if not _served:
        raise EplbError("the dispatch is asked for slots, but was not set up in this process")
    return _served[0]


# Opaque to torch.compile, which SGLang's mapping runs within: no graph break, and no look at the kernels.
@torch.library.custom_op(
    "eplb_plugin::sglang_slots",
    mutates_args=(),
    schema="(Tensor expert_ids, Tensor slots, Tensor first, Tensor counts) -> Tensor",
)
def _choose(
    expert_ids: torch.Tensor, slots: torch.Tensor, first: torch.Tensor, counts: torch.Tensor
) -> torch.Tensor:
    return _in_force().slots(expert_ids, LayerTables(slots.view(-1), first, counts))


@_choose.register_fake
def _(
    expert_ids: torch.Tensor, slots: torch.Tensor, first: torch.Tensor, counts: torch.Tensor
) -> torch.Tensor:
    return torch.empty_like(expert_ids, memory_format=torch.contiguous_format)


def to_slots(topk_ids: torch.Tensor, info: Any, log2phy_prob: torch.Tensor | None = None) -> torch.Tensor:
    """In place of SGLang's `topk_ids_logical_to_physical`.

    Args:
        topk_ids: int32 or int64 [tokens, top_k], logical experts; -1 stays -1.
        info: SGLang's ExpertLocationDispatchInfo; None where experts and slots are the same.
        log2phy_prob: what `LayerSolver.solve` gave for these ids; None without an all-to-all backend.

    Raises:
        EplbError: no solver was asked although each rank has its own tokens.
    """
    if info is None:
        return topk_ids
    if info.ep_dispatch_algorithm == _SOLVER:
        if log2phy_prob is None:
            raise EplbError(f"SGLang asked no solver for the slots of {tuple(topk_ids.shape)} expert ids")
        return log2phy_prob
    return _choose(
        topk_ids,
        info.partial_logical_to_all_physical_map,
        _in_force().first_of_row,
        info.partial_logical_to_all_physical_map_num_valid,
    )


class LayerSolver:
    """In place of SGLang's solver of one layer. It gives slots instead of shares, for `to_slots`."""

    def __init__(self, replicas: LayerTables) -> None:
        self._replicas = replicas

    def solve(self, topk_ids: torch.Tensor) -> torch.Tensor:
        """The slot of each token; shape and dtype of `topk_ids`.

        All ranks call it together, also those without tokens.

        Args:
            topk_ids: int32 or int64 [tokens, top_k] of this rank, logical experts; -1 stays -1.
        """
        return _choose(topk_ids, *self._replicas)


class LayerSolvers:
    """The solvers of all layers. Their tables keep their addresses: captured graphs see new placements.

    Args:
        physical_to_logical: int64 [layers, slots] on the CPU, the map in force, equal on all ranks. SGLang's
            own list of replicas is not: at the start it holds the nearest replica of each rank.
        num_logical: logical experts per layer.
        topology: number of slots.
        device: where expert ids arrive.

    Raises:
        PlacementError: the map leaves experts out.
    """

    def __init__(
        self, physical_to_logical: torch.Tensor, num_logical: int, topology: Topology, device: torch.device
    ) -> None:
        self._placement = Placement(physical_to_logical, num_logical)
        self._tables = ReplicaTables(self._placement, topology, device=device)
        self.solvers = [LayerSolver(self._tables.of_layer(n)) for n in range(self._placement.num_layers)]

    def update(self, physical_to_logical: torch.Tensor) -> list[int]:
        """Put another map in force, and say which layers it changed. All ranks call it after the same step.

        Raises:
            PlacementError: the map has another shape or leaves experts out; nothing was changed.
        """
        new, old = Placement(physical_to_logical, self._placement.num_logical), self._placement
        changed = list(range(old.num_layers))
        if new.num_layers == old.num_layers and new.num_slots == old.num_slots:
            differs = new.physical_to_logical != old.physical_to_logical
            changed = differs.any(1).nonzero().flatten().tolist()
        self._tables.update(new, changed)
        self._placement = new
        return changed
