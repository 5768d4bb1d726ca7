"""A check at the start: does a layer hold tensors with a row for each slot that nobody registered?

What is not registered does not move with its expert, and answers are wrong without an error. A module can
be searched for it, but no search is sure.

Not everything found belongs to experts. These can be false alarms:
- on a single rank, or where a rank has as many slots as there are experts: what the router has per logical
  expert, its weight or `e_score_correction_bias`;
- what happens to have as many rows as the rank has slots, when the module holds more than the experts, and
  anything with one row when a rank has one slot;
- copies that the layer no longer uses.

Not everything that belongs to experts is found. These are passed over:
- tensors in lists, or in objects that are no modules;
- integers [slots] (int32, int64): maps of experts and counters look like that, zero points seldom do;
- what is equal for all slots of a rank: activation scales that experts share, work space;
- tensors that lie between the rows of a registered one.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ...core.errors import TransferError
from ..weights.expert_weights import byte_rows

__all__ = ["unregistered_tensors", "warn_unregistered"]

_logger = logging.getLogger(__name__)


def unregistered_tensors(
    module: torch.nn.Module, registered: Sequence[torch.Tensor], slots: int, name: str = ""
) -> list[str]:
    """Names, shapes and dtypes of the tensors of a layer that have a row for each slot and do not move.

    Looks at parameters, buffers and tensors that are plain attributes, also those of submodules.

    Args:
        module: an MoE layer; best the part of it that holds the experts alone.
        registered: the tensors that move; views of the module's will do.
        slots: slots on this rank.
        name: of the module, put before the names of its tensors.
    """
    moved = [_extent(tensor) for tensor in registered]
    found = []
    for own_name, tensor in _tensors(module, name):
        if not _has_slots(tensor, slots):
            continue
        device, start, end = _extent(tensor)
        if any(device == where and start < last and first < end for where, first, last in moved):
            continue
        if slots == 1 or _differs_by_slot(tensor, slots):
            found.append(f"{own_name} {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}")
    return found


def warn_unregistered(
    modules: Sequence[torch.nn.Module],
    weights: Sequence[Sequence[torch.Tensor]],
    slots: int,
    numbers: Sequence[int] | None = None,
) -> int:
    """One warning that names all `unregistered_tensors`; returns how many there are.

    Args:
        modules: for each MoE layer, the module that holds its experts.
        weights: for each of them, the tensors that move.
        slots: slots on this rank.
        numbers: what the layers are called; None numbers them from 0.
    """
    layers_of: dict[str, list[int]] = defaultdict(list)
    numbers = range(len(modules)) if numbers is None else numbers
    for number, module, registered in zip(numbers, modules, weights, strict=True):
        for tensor in unregistered_tensors(module, registered, slots):
            layers_of[tensor].append(number)
    tensors_of: dict[str, list[str]] = defaultdict(list)
    for tensor, layers in layers_of.items():
        tensors_of[_ranges(layers)].append(tensor)
    count = sum(len(layers) for layers in layers_of.values())
    if count:
        _logger.warning(
            "tensors with a row for each of %d slots do not move with the experts; if they belong to "
            "experts, answers are wrong after a rebalance: %s",
            slots,
            "; ".join(f"{layers}: {', '.join(tensors)}" for layers, tensors in tensors_of.items()),
        )
    return count


def _tensors(module: torch.nn.Module, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor once, by its first name."""
    seen = set()
    for prefix, part in module.named_modules(prefix=name):
        for key, value in [*part._parameters.items(), *part._buffers.items(), *vars(part).items()]:
            if isinstance(value, torch.Tensor) and id(value) not in seen:
                seen.add(id(value))
                yield from _unwrapped(f"{prefix}.{key}" if prefix else key, value)


def _unwrapped(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensor, or those that it wraps."""
    if is_traceable_wrapper_subclass(tensor):
        for part in tensor.__tensor_flatten__()[0]:
            yield from _unwrapped(f"{name}.{part}", getattr(tensor, part))
    else:
        yield name, tensor


def _has_slots(tensor: torch.Tensor, slots: int) -> bool:
    if tensor.layout != torch.strided or tensor.is_meta or not tensor.numel() or not tensor.dim():
        return False
    is_map = tensor.dim() == 1 and tensor.dtype in (torch.int32, torch.int64)
    return tensor.shape[0] == slots and not is_map


def _extent(tensor: torch.Tensor) -> tuple[torch.device, int, int]:
    """Device, first byte and the byte after the last of the memory that a tensor spans."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return tensor.device, start, start + (last + 1) * tensor.element_size() if tensor.numel() else start


def _differs_by_slot(tensor: torch.Tensor, slots: int) -> bool:
    if tensor.stride(0) == 0:
        return False
    try:
        rows = byte_rows(tensor, "tensor", slots)
    except TransferError:  # a layout that cannot be compared
        return True
    return any(not torch.equal(rows[0], row) for row in rows[1:])


def _ranges(numbers: Sequence[int]) -> str:
    """`layer 4`, `layers 3-60`, `layers 0, 2-4`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    text = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"{'layer' if len(numbers) == 1 else 'layers'} {text}"
