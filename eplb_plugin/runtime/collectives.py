"""What ranks say to each other: sums, maps, and the agreement that nothing happens without.

Every method of `RankGroup` is called by all ranks of the group, in the same order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from ..errors import AgreementError, EplbError, TopologyError
from ..topology import Topology

__all__ = ["RankGroup", "fingerprint"]

_T = TypeVar("_T")


def fingerprint(*parts: torch.Tensor | str) -> int:
    """A 63-bit hash of tensors (by dtype, shape and content) and strings; the same on every machine."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        if isinstance(part, str):
            digest.update(part.encode() + b"\0")
        else:
            digest.update(f"{part.dtype} {tuple(part.shape)}\0".encode())
            digest.update(part.detach().cpu().contiguous().numpy().tobytes())
    return int.from_bytes(digest.digest(), "little") >> 1


class RankGroup:
    """The expert-parallel group: a process group, or one lone rank without any.

    Ranks here are ranks within the group, which number the ranks of the topology.

    Args:
        group: process group; None is the default group where one is initialised, else a lone rank.
        alone: be a lone rank even then; not together with a group.
        device: device of the tensors that collectives run on; NCCL needs a CUDA device.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
        *,
        alone: bool = False,
    ) -> None:
        initialised = dist.is_available() and dist.is_initialized()
        if alone and group is not None:
            raise EplbError("a lone rank has no group, but one was given")
        if group is not None and not initialised:
            raise EplbError("a group was given, but torch.distributed is not initialised")
        self.group: dist.ProcessGroup | None = None
        if initialised and not alone:
            self.group = group if group is not None else dist.group.WORLD
        self.size = dist.get_world_size(self.group) if self.group is not None else 1
        self.rank = dist.get_rank(self.group) if self.group is not None else 0
        if self.rank < 0:
            raise EplbError(f"this process is not one of the {self.size} of the group")
        self.device = torch.device(device) if device is not None else self._default_device()

    def check_topology(self, topology: Topology) -> None:
        """Raise TopologyError unless there is one process for each rank of the topology."""
        if topology.num_ranks != self.size:
            raise TopologyError(
                f"the topology has num_ranks={topology.num_ranks}, the group {self.size} processes"
            )

    def peer(self, rank: int) -> int:
        """The number of `rank` in the default group, as point-to-point operations want it."""
        return dist.get_global_rank(self.group, rank) if self.group is not None else rank

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place; the same shape on every rank."""
        if self.size > 1 and tensor.numel():
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def broadcast(self, tensor: torch.Tensor, source: int = 0) -> torch.Tensor:
        """Overwrite `tensor` with that of rank `source`; the same shape on every rank."""
        if self.size > 1:
            dist.broadcast(tensor, self.peer(source), group=self.group)
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """[ranks, ...]: the tensors of all ranks, of one shape."""
        if self.size == 1:
            return tensor.unsqueeze(0)
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous(), group=self.group)
        return torch.stack(parts)

    def agree(self, what: str, value: int) -> None:
        """Check that all ranks hold the same `value` (a fingerprint).

        Raises:
            AgreementError: on all ranks; names the ranks that hold each value.
        """
        values = self.all_gather(torch.tensor([value], device=self.device)).flatten().tolist()
        if len(set(values)) > 1:
            held = {v: [r for r, other in enumerate(values) if other == v] for v in sorted(set(values))}
            described = "; ".join(f"{v:016x} on ranks {ranks}" for v, ranks in held.items())
            raise AgreementError(f"ranks disagree on {what}: {described}")

    def failures(self, error: BaseException | None) -> dict[int, str]:
        """Which ranks failed, and how: empty when none did. `error` is this rank's failure or None."""
        failed = torch.tensor([int(error is not None)], device=self.device)
        if not int(self.sum(failed)):
            return {}
        message = None if error is None else f"{type(error).__name__}: {error}"
        messages: list[str | None] = [message]
        if self.size > 1:
            messages = [None] * self.size
            dist.all_gather_object(messages, message, group=self.group)
        return {rank: text for rank, text in enumerate(messages) if text is not None}

    def attempt(self, phase: str, action: Callable[[], _T], raises: type[EplbError]) -> _T:
        """Run `action` on every rank; if it fails on any, `raises` is raised on all, naming ranks and causes
        (on a rank that failed with an error of this package: that kind of error).

        `action` itself must not call a collective, or a rank that fails early leaves the others in it.
        """
        result, error = try_action(action)
        failed = self.failures(error)
        if failed:
            causes = "; ".join(f"rank {rank}: {text}" for rank, text in failed.items())
            kind = type(error) if isinstance(error, EplbError) else raises
            raise kind(f"{phase} failed on {len(failed)} of {self.size} ranks: {causes}") from error
        return cast(_T, result)

    def _default_device(self) -> torch.device:
        if self.group is not None and "nccl" in str(dist.get_backend(self.group)):
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")


def try_action(action: Callable[[], _T]) -> tuple[_T | None, Exception | None]:
    """The result of `action` or the exception that it raised, for those that have to tell other ranks."""
    try:
        return action(), None
    except Exception as error:  # every kind, since the other ranks wait
        return None, error
