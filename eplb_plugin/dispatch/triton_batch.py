"""The split of a batch on a GPU: three launches without a host in between, for captured graphs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch

from ..core.errors import ConfigError, LoadError
from ..core.topology import Topology
from .tables import LayerTables

__all__ = ["SplitOfCounts", "TritonSplit"]

_MOST = 2**29  # ids of a batch over all ranks
_OLDEST = (3, 4)  # Triton whose histograms take a mask
_COUNTERS = 64  # programs that count, at most: one program adds up what they found
_IDS = 128  # ids that one program gives their slots


def _check_triton(device: torch.device) -> None:
    try:
        from triton import __version__
    except ImportError as error:
        raise ConfigError(f"dispatch='balanced' on {device} needs Triton: {error}") from error
    if tuple(map(int, __version__.split(".")[:2])) < _OLDEST:
        raise ConfigError(
            f"dispatch='balanced' on {device} needs Triton {'.'.join(map(str, _OLDEST))} or later; "
            f"{__version__} is installed"
        )


def _power(number: int) -> int:
    """The least power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()


class SplitOfCounts(NamedTuple):
    """The split of a batch whose counts are known.

    Attributes:
        tokens: int32 [slots], tokens of each slot.
        steps: int32 [1], dependent steps of the sweeps; the last one changes nothing.
    """

    tokens: torch.Tensor
    steps: torch.Tensor


class TritonSplit:
    """Launches the kernels of `triton_slot`.

    Nothing waits for the device or reads from it. With `gather`, counts are set to zero before, a fourth
    launch. The first call for each dtype of ids and tables compiles: make one before a graph is captured.

    Args:
        topology: ranks and slots.
        rank: this rank.
        expert_cost: least cost of a replica in use, in tokens.
        gather: the counts of all ranks from those of this one; None where every rank has all tokens.
        device: where expert ids arrive. On the CPU, only Triton's interpreter runs the kernels.

    Raises:
        ConfigError: Triton cannot be imported, or is too old.
    """

    def __init__(
        self,
        topology: Topology,
        *,
        rank: int = 0,
        expert_cost: int = 0,
        gather: Callable[[torch.Tensor], torch.Tensor] | None = None,
        device: torch.device | str,
    ) -> None:
        device = torch.device(device)
        _check_triton(device)
        # Importing numba takes a while.
        from .split_kernels import FINE_SWEEPS, MOST_FINE, SHIFT

        self._gather, self._num_slots = gather, topology.num_slots
        self._most_ids = _MOST if gather is None else _MOST // topology.num_ranks
        first, sizes = (
            torch.tensor(numbers, dtype=torch.int32)
            for numbers in (topology.first_slots[:-1], topology.slots_by_rank)
        )
        ranks = torch.arange(topology.num_ranks, dtype=torch.int32).repeat_interleave(sizes)
        with torch.inference_mode(False):
            of_ranks = [numbers.to(device) for numbers in (ranks, first, sizes)]
        self._device = of_ranks[0].device
        # Costs are below the ids of all ranks plus expert_cost * slots. Four times as much in parts of tokens
        # has to fit int32, which GPUs divide several times faster than int64.
        narrow = expert_cost * topology.num_slots <= MOST_FINE
        self._cost_type = torch.int32 if narrow else torch.int64
        # One lane is one rank. The lanes of one warp exchange without a barrier.
        self._lanes = max(32, _power(topology.num_ranks))
        self._constants: dict[str, Any] = {
            **dict(zip(("rank_of_slot", "first_slot", "slots_of_rank"), of_ranks, strict=True)),
            "rank": rank,
            "GATHERED": gather is not None,
            "NUM_RANKS": topology.num_ranks,
            "NUM_SLOTS": topology.num_slots,
            "MOST_SLOTS": topology.most_slots,
            "EXPERT_COST": expert_cost,
            "FINE_SWEEPS": FINE_SWEEPS,
            "SHIFT": SHIFT,
            "MOST_FINE": MOST_FINE,
            "MOST": 2**30 if narrow else 2**62,
            "RANKS": self._lanes,
            "TILE": min(_power(topology.num_slots), 512),
            "WIDTH": min(_power(topology.most_slots), 16),
            "IDS": _IDS,
        }

    def slots(
        self, expert_ids: torch.Tensor, replicas: LayerTables, num_tokens: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The slot of each token, see `BatchSplit.slots`; what is no expert becomes -1.

        Raises:
            LoadError: more ids than are counted.
        """
        from . import triton_slot as kernels

        chosen = torch.empty_like(expert_ids, memory_format=torch.contiguous_format)
        ids, logical = expert_ids.contiguous().view(-1), len(replicas.counts)
        if not len(ids):
            self._rows(torch.zeros_like(replicas.counts), logical)
            return chosen
        args = self._args(ids, replicas) | {"chosen": chosen}
        args["num_tokens"], args["PADDED"] = (ids, False) if num_tokens is None else (num_tokens, True)
        args["top_k"] = expert_ids.shape[1] if expert_ids.dim() == 2 else 1
        counters = -(-args["num_blocks"] // args["blocks_each"])
        with self._current_device():
            if self._gather is None:
                args["sums"] = ids.new_empty(counters, logical, dtype=torch.int32)
            else:
                args["sums"] = replicas.counts.new_zeros(logical)
            self._launch(kernels.count, 1 + counters, args, num_warps=8)
            args["rows"] = self._rows(args["sums"], logical)
            args["num_rows"] = len(args["rows"])
            # After the message: the other ranks wait for it.
            if len(ids) > self._most_ids:
                raise LoadError(f"expert_ids has {len(ids)} entries; at most {self._most_ids} are counted")
            others = -(-logical // kernels.PART.value) + -(-len(ids) // kernels.CHUNK.value)
            self._launch(kernels.split, 1 + others, args, num_warps=self._warps)
            self._launch(kernels.assign, -(-len(ids) // _IDS), args, num_warps=4)
        return chosen

    def split(self, counts: torch.Tensor, replicas: LayerTables) -> SplitOfCounts:
        """The split of a batch by its counts alone, and the dependent steps that it took.

        Args:
            counts: int32 or int64 [logical], tokens of the whole batch, 2^29 at most.
            replicas: the replicas of the layer.
        """
        from . import triton_slot as kernels

        args = self._args(counts[:0], replicas)
        args |= {"num_tokens": counts, "PADDED": False, "GATHERED": False, "top_k": 1, "sums": counts}
        args |= {"rows": counts, "num_rows": 1}
        with self._current_device():
            self._launch(kernels.count, 1, args, num_warps=8)
            self._launch(kernels.split, 1, args, num_warps=self._warps)
        return SplitOfCounts(args["lists"][kernels.GIVEN.value], args["steps"])

    def _rows(self, sums: torch.Tensor, logical: int) -> torch.Tensor:
        """[rows, logical]: the counts of all ranks from `sums`; `sums` where every rank has all tokens."""
        if self._gather is None:
            return sums
        rows, ranks = self._gather(sums).contiguous(), self._constants["NUM_RANKS"]
        if rows.shape != (ranks, logical):
            raise LoadError(
                f"gather gave counts of shape {tuple(rows.shape)}, not of {ranks} ranks and {logical} experts"
            )
        return rows

    @property
    def _warps(self) -> int:
        return min(self._lanes // 32, 8)

    def _current_device(self) -> AbstractContextManager[object]:
        """Triton launches on the current device."""
        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()

    def _args(self, ids: torch.Tensor, replicas: LayerTables) -> dict[str, Any]:
        """By name, what the kernels have in common for these ids; scratch included."""
        from . import triton_slot as kernels

        logical, blocks = len(replicas.counts), -(-len(ids) // kernels.BLOCK.value)

        def scratch(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=ids.device)

        return {
            **self._constants,
            "ids": ids,
            "num_ids": len(ids),
            "num_blocks": blocks,
            "blocks_each": max(1, -(-blocks // _COUNTERS)),
            **{name: table.contiguous() for name, table in replicas._asdict().items()},
            "lists": scratch(kernels.NUM_LISTS, self._num_slots),
            "total": scratch(logical),
            "own_costs": scratch(self._num_slots, dtype=self._cost_type),
            "arrived": scratch(self._num_slots, dtype=self._cost_type),
            "steps": scratch(1),
            "block_counts": scratch(blocks, logical),
            "before_block": scratch(blocks, logical),
            "lower_ranks": scratch(logical),
            "positions": scratch(len(ids)),
            "NUM_LOGICAL": logical,
            "EXPERTS": max(32, _power(logical)),
        }

    def _launch(self, kernel: Any, programs: int, args: dict[str, Any], *, num_warps: int) -> None:
        kernel[(programs,)](**{name: args[name] for name in kernel.arg_names}, num_warps=num_warps)
