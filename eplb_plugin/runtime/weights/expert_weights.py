"""Expert weights of one rank as rows of bytes, whatever their dtype."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakValueDictionary

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ...core.errors import TransferError
from ...core.topology import Topology

__all__ = ["ExpertWeights", "byte_rows", "is_packed", "padded"]

# Rows of at least this many bytes are sent from where they are; smaller ones (scales, biases, small
# experts) share one message per pair of ranks, since a message costs more than copying them: over gloo a
# fifth of the time for rows of 128 KiB, a tenth for 256 KiB, and nothing from 512 KiB on.
_OWN_MESSAGE = 384 * 1024
_ALIGN = 16

# torch packs several values of these into a byte, but counts strides in values.
_PACKED_DTYPES = (torch.quint4x2, torch.quint2x4)

# By the address of a tensor's first slot, while somebody holds them.
_owners: WeakValueDictionary[int, ExpertWeights] = WeakValueDictionary()


def byte_rows(tensor: torch.Tensor, name: str, slots: int) -> torch.Tensor:
    """The tensor's own memory as uint8 [slots, bytes per slot]; writing to it writes the tensor.

    Args:
        tensor: [slots, ...], any dtype; slots may lie apart, each slot's values in one piece.
        name: what to call it in errors.
        slots: slots on this rank.

    Raises:
        TransferError: the tensor has another layout, and what is wrong with it.
    """
    if not isinstance(tensor, torch.Tensor):
        raise TransferError(f"{name} is a {type(tensor).__name__}, not a tensor")
    if is_traceable_wrapper_subclass(tensor):
        raise TransferError(f"{name} is a {type(tensor).__name__}, which wraps other tensors; register those")
    described = f"{name} ({tensor.dtype} {tuple(tensor.shape)}, strides {_strides(tensor)})"
    if tensor.layout != torch.strided:
        raise TransferError(f"{name} has layout {tensor.layout}, not strided")
    if tensor.dim() == 0 or tensor.shape[0] != slots:
        raise TransferError(f"{described} has to have slots first, {slots} on each rank")
    if tensor.is_conj() or tensor.is_neg():
        raise TransferError(f"{described} is a lazy conjugate or negation; call resolve_conj, resolve_neg")
    if tensor.dtype in _PACKED_DTYPES or (
        tensor.is_quantized and tensor.qscheme() != torch.per_tensor_affine
    ):
        raise TransferError(f"{described} has a quantisation whose scales would not move with its slots")
    if tensor.numel() and not tensor[0].is_contiguous():
        raise TransferError(f"{described} has slots whose values do not lie in one piece")
    row_bytes = tensor.numel() // slots * tensor.element_size()
    stride = tensor.stride(0) * tensor.element_size() if slots > 1 else row_bytes
    if stride < row_bytes:
        raise TransferError(f"{described} has slots that overlap: {stride} bytes apart, {row_bytes} each")
    # Not an inference tensor, even when an engine registers its weights in inference mode: those refuse
    # to be written to outside of it.
    with torch.inference_mode(False):
        return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(
            tensor.untyped_storage(),
            tensor.storage_offset() * tensor.element_size(),
            (slots, row_bytes),
            (stride, 1),
        )


class ExpertWeights:
    """Everything that has to move when an expert moves: per layer, tensors [slots on this rank, ...].

    Layers may differ from each other in number, shape and dtype of tensors; ranks may not. What somebody has
    claimed cannot be registered again before it is released, so that no two balancers write to it.

    Args:
        layers: for each layer, its tensors: weights, scales, biases.
        topology: gives the slots of a rank.

    Raises:
        TransferError: a tensor is malformed (see `byte_rows`), on another device, or claimed already.
    """

    def __init__(self, layers: Sequence[Sequence[torch.Tensor]], topology: Topology) -> None:
        self._layers, self._topology = layers, topology
        self._places: list[tuple[str, torch.Tensor, tuple[object, ...]]] = []
        self._claimed = False
        self.rows: list[list[torch.Tensor]] = []
        described = []
        seen: dict[int, str] = {}
        device: torch.device | None = None
        for layer, tensors in enumerate(layers):
            if isinstance(tensors, torch.Tensor):
                raise TransferError(f"weights of layer {layer} are one tensor, not a list of tensors")
            rows = []
            for index, tensor in enumerate(tensors):
                name = f"tensor {index} of layer {layer}"
                row = byte_rows(tensor, name, topology.slots_per_rank)
                described.append(f"{layer} {tensor.dtype} {tuple(tensor.shape[1:])} {_quantisation(tensor)}")
                if not row.numel():
                    continue
                device = device or row.device
                if row.device != device:
                    raise TransferError(f"{name} is on {row.device}, others are on {device}")
                # Moving the same memory for two tensors would move it twice.
                if row.data_ptr() in seen:
                    raise TransferError(f"{name} starts at the memory of {seen[row.data_ptr()]}")
                owner = _owners.get(row.data_ptr())
                if owner is not None and owner._claimed:
                    raise TransferError(
                        f"{name} belongs to a balancer that is not closed yet; close that first"
                    )
                seen[row.data_ptr()] = name
                rows.append(row)
                self._places.append((name, tensor, _place(tensor)))
            self.rows.append(rows)
        # Asked for again and again, for every layer of a hop and every expert that moves.
        self._staged = [sum(padded(row[0]) for row in rows) for rows in self.rows]
        self._packed = [sum(padded(row[0]) for row in rows if is_packed(row)) for rows in self.rows]
        self.device = device
        """Where the weights are; None when there are none."""
        self.signature = "\n".join(described)
        """What has to be the same on all ranks."""
        self._addresses = list(seen)

    def claim(self) -> None:
        """Keep others from moving the same memory."""
        self._claimed = True
        _owners.update(dict.fromkeys(self._addresses, self))

    def release(self) -> None:
        """Let the memory be registered again. Nothing may be moved by this object any more."""
        self._claimed = False

    def check(self) -> None:
        """Raise TransferError where a tensor lies elsewhere than when it was registered: its old memory would
        move, and its new memory stay."""
        for name, tensor, place in self._places:
            if _place(tensor) != place:
                raise TransferError(
                    f"{name} has other memory than when it was registered; an engine that loads weights anew "
                    "does so within `Rebalancer.replacing_weights`"
                )

    def again(self) -> ExpertWeights:
        """The same tensors, wherever they are now."""
        return ExpertWeights(self._layers, self._topology)

    @property
    def num_layers(self) -> int:
        return len(self.rows)

    def expert_bytes(self, layer: int) -> int:
        """Bytes of one expert of the layer, over all its tensors."""
        return sum(row.shape[1] for row in self.rows[layer])

    def staged_bytes(self, layer: int) -> int:
        """Bytes that one expert of the layer takes up in a staging buffer."""
        return self._staged[layer]

    def packed_bytes(self, layer: int) -> int:
        """Those of them that share a message with others, which takes up memory where they are sent from."""
        return self._packed[layer]


def _place(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def padded(row: torch.Tensor) -> int:
    """Bytes that a row, uint8 [bytes], takes up in a staging buffer."""
    return -(-row.numel() // _ALIGN) * _ALIGN


def is_packed(row: torch.Tensor) -> bool:
    """Whether rows, uint8 [..., bytes], share a message with others."""
    return row.shape[-1] < _OWN_MESSAGE


def _strides(tensor: torch.Tensor) -> tuple[int, ...]:
    return tensor.stride() if tensor.layout == torch.strided else ()


def _quantisation(tensor: torch.Tensor) -> str:
    """Scale and zero point that the slots share with the tensor, hence have to be alike on all ranks."""
    return f"{tensor.q_scale()} {tensor.q_zero_point()}" if tensor.is_quantized else ""
