"""Expert weights of one rank as rows of bytes: the one place that knows the formats of weight tensors.

Registration turns each tensor [slots, ...] into uint8 [slots, bytes per slot] on the same memory. Migration,
staging, checksums and the search for unregistered tensors see these rows alone. Support for a new format
(NVFP4 and its scales, say) goes into `byte_rows` or `inner_tensors`, and nowhere else:

- Any dtype of whole bytes works, also sub-byte values that the engine packs itself (uint8, float4_e2m1fn_x2).
- Quantised dtypes of torch work with one scale for the tensor; scales per channel would stay behind.
- Slots may lie apart (padding between them). The values of one slot lie in one piece.
- Expanded tensors (one scale for all slots, stride 0) are refused: every slot would write the same memory.
- Tensor subclasses that wrap others (a value and its scales) are refused: their inner tensors are registered.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from weakref import WeakValueDictionary

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ...core.errors import TransferError
from ...core.topology import Topology

__all__ = ["ExpertWeights", "byte_rows", "inner_tensors", "memory_span", "padded"]

# Smaller rows (scales, biases, small experts) share messages, since a message costs more than a copy. Gain
# over gloo: a fifth of the time for rows of 128 KiB, a tenth for 256 KiB, none from 512 KiB on.
_OWN_MESSAGE = 384 * 1024  # bytes
_ALIGN = 16  # bytes

# torch packs several values of these into a byte, but counts strides in values.
_SUB_BYTE_DTYPES = (torch.quint4x2, torch.quint2x4)

# By the address of a tensor's first slot. An entry ends with its owner.
_owners: WeakValueDictionary[int, ExpertWeights] = WeakValueDictionary()


def byte_rows(tensor: torch.Tensor, name: str, slots: int) -> torch.Tensor:
    """The tensor's own memory as uint8 [slots, bytes per slot]; a write to it writes the tensor.

    Args:
        tensor: [slots, ...], any dtype; slots may lie apart, the values of one slot lie in one piece.
        name: of the tensor, for errors.
        slots: on this rank.

    Raises:
        TransferError: unsupported format; the message names shape, strides and rule.
    """
    if not isinstance(tensor, torch.Tensor):
        raise TransferError(f"{name} is a {type(tensor).__name__}, not a tensor")
    if is_traceable_wrapper_subclass(tensor):
        raise TransferError(f"{name} is a {type(tensor).__name__}, which wraps other tensors; register those")
    if tensor.layout != torch.strided:
        raise TransferError(f"{name} has layout {tensor.layout}, not strided")
    described = f"{name} ({tensor.dtype} {tuple(tensor.shape)}, strides {tensor.stride()})"
    if tensor.dim() == 0 or tensor.shape[0] != slots:
        raise TransferError(f"{described} has to have slots first, {slots} on this rank")
    if tensor.is_conj() or tensor.is_neg():
        raise TransferError(f"{described} is a lazy conjugate or negation; call resolve_conj, resolve_neg")
    if tensor.dtype in _SUB_BYTE_DTYPES or (
        tensor.is_quantized and tensor.qscheme() != torch.per_tensor_affine
    ):
        raise TransferError(f"{described} has a quantisation whose scales would not move with its slots")
    if tensor.numel() and not tensor[0].is_contiguous():
        raise TransferError(f"{described} has slots whose values do not lie in one piece")
    row_bytes = tensor.numel() // slots * tensor.element_size()
    stride = tensor.stride(0) * tensor.element_size() if slots > 1 else row_bytes
    if stride < row_bytes:
        raise TransferError(f"{described} has slots that overlap: {stride} bytes apart, {row_bytes} each")
    # Engines may register weights in inference mode, whose tensors refuse writes outside of it.
    with torch.inference_mode(False):
        return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(
            tensor.untyped_storage(),
            tensor.storage_offset() * tensor.element_size(),
            (slots, row_bytes),
            (stride, 1),
        )


def inner_tensors(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of the tensors that a subclass wraps, at any depth; of a plain tensor, itself."""
    if is_traceable_wrapper_subclass(tensor):
        for part in tensor.__tensor_flatten__()[0]:
            yield from inner_tensors(f"{name}.{part}", getattr(tensor, part))
    else:
        yield name, tensor


def memory_span(tensor: torch.Tensor) -> tuple[torch.device, int, int]:
    """Device, address of the first byte, and address behind the last byte of a strided tensor."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return tensor.device, start, start + (last + 1) * tensor.element_size() if tensor.numel() else start


class ExpertWeights:
    """The tensors that move with an expert: per layer, any number of tensors [slots on this rank, ...].

    Layers may differ in number, shape and dtype of tensors; ranks may not. Claimed memory cannot be
    registered a second time, so that no two balancers write to it.

    Args:
        layers: for each layer, its tensors: weights, scales, biases.
        topology: gives the slots of a rank.
        rank: this rank, if ranks differ in slots.

    Attributes:
        rows: for each layer and tensor that is not empty, uint8 [slots on this rank, bytes per slot].
        device: where the weights are; None without weights.
        signature: number, dtypes and shapes of tensors; equal on all ranks.
        expert_bytes: for each layer, bytes of one expert over all its tensors.
        staged_bytes: for each layer, the same in a staging buffer, with alignment.
        coalesced: for each layer, indices of the tensors that share messages; the others have their own.
        coalesced_bytes: for each layer, their bytes of one expert, with alignment: what a sender needs.

    Raises:
        TransferError: a tensor has an unsupported format (see `byte_rows`), is on another device, or is
            claimed.
    """

    def __init__(self, layers: Sequence[Sequence[torch.Tensor]], topology: Topology, rank: int = 0) -> None:
        self._layers, self._topology, self._rank = layers, topology, rank
        self._registered: list[tuple[str, torch.Tensor, tuple[object, ...]]] = []
        self._claimed = False
        self.rows: list[list[torch.Tensor]] = []
        self.device: torch.device | None = None
        described = []
        seen: dict[int, str] = {}
        for layer, tensors in enumerate(layers):
            if isinstance(tensors, torch.Tensor):
                raise TransferError(f"weights of layer {layer} are one tensor, not a list of tensors")
            self.rows.append([])
            for index, tensor in enumerate(tensors):
                name = f"tensor {index} of layer {layer}"
                row = byte_rows(tensor, name, topology.slots_by_rank[rank])
                # A quantised tensor's scale and zero point stay on their rank, hence have to be equal on all.
                scales = f"{tensor.q_scale()} {tensor.q_zero_point()}" if tensor.is_quantized else ""
                described.append(f"{layer} {tensor.dtype} {tuple(tensor.shape[1:])} {scales}")
                if not row.numel():
                    continue
                self.device = self.device or row.device
                self._check_row(row, name, seen)
                seen[row.data_ptr()] = name
                self.rows[-1].append(row)
                self._registered.append((name, tensor, _identity(tensor)))
        self.signature = "\n".join(described)
        self._addresses = list(seen)
        # Once for all: planning asks for every layer and every expert that moves.
        self.expert_bytes = [sum(row.shape[1] for row in rows) for rows in self.rows]
        self.staged_bytes = [sum(padded(row[0]) for row in rows) for rows in self.rows]
        self.coalesced = [
            [index for index, row in enumerate(rows) if row.shape[1] < _OWN_MESSAGE] for rows in self.rows
        ]
        self.coalesced_bytes = [
            sum(padded(rows[index][0]) for index in small)
            for rows, small in zip(self.rows, self.coalesced, strict=True)
        ]

    def _check_row(self, row: torch.Tensor, name: str, seen: dict[int, str]) -> None:
        if row.device != self.device:
            raise TransferError(f"{name} is on {row.device}, others are on {self.device}")
        # The same memory under two names would move twice.
        if row.data_ptr() in seen:
            raise TransferError(f"{name} starts at the memory of {seen[row.data_ptr()]}")
        owner = _owners.get(row.data_ptr())
        if owner is not None and owner._claimed:
            raise TransferError(f"{name} belongs to a balancer that is not closed yet; close that first")

    def claim(self) -> None:
        """Keep other balancers from the same memory."""
        self._claimed = True
        _owners.update(dict.fromkeys(self._addresses, self))

    def release(self) -> None:
        """Allow the memory to be registered again. This object may move nothing any more."""
        self._claimed = False

    def check(self) -> None:
        """Raise TransferError for a tensor whose memory is no longer the registered one: migration would move
        the old memory, while the engine uses the new."""
        for name, tensor, identity in self._registered:
            if _identity(tensor) != identity:
                raise TransferError(
                    f"{name} has other memory than when it was registered; an engine that loads weights anew "
                    "does so within `Rebalancer.replacing_weights`"
                )

    def again(self) -> ExpertWeights:
        """A new registration of the same tensors, at their present memory."""
        return ExpertWeights(self._layers, self._topology, self._rank)


def padded(row: torch.Tensor) -> int:
    """Bytes of a row, uint8 [bytes], in a staging buffer, with alignment: 33 bytes take 48."""
    return -(-row.numel() // _ALIGN) * _ALIGN


def _identity(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
