"""A search at the start for unregistered tensors with a row for each slot of a layer.

An unregistered tensor does not move with its expert, and answers are wrong without an error. The search is a
heuristic.

False alarms are possible:
- router tensors per logical expert (its weight, `e_score_correction_bias`), if a rank has as many slots as
  there are experts;
- any tensor of the module with as many rows as the rank has slots, or with one row if a rank has one slot;
- copies that the layer no longer uses.

Tensors of experts that it does not find:
- tensors in lists, or in objects that are no modules;
- integers [slots] (int32, int64): expert maps and counters look like that, zero points seldom do;
- values equal for all slots of a rank: shared activation scales, work space;
- tensors between the rows of a registered one.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch

from ...core.errors import TransferError
from ..weights.expert_weights import byte_rows, inner_tensors, memory_span

__all__ = ["unregistered_tensors", "warn_unregistered"]

_logger = logging.getLogger(__name__)


def unregistered_tensors(
    module: torch.nn.Module, registered: Sequence[torch.Tensor], slots: int, name: str = ""
) -> list[str]:
    """Names, shapes and dtypes of the tensors of a layer that have a row for each slot and do not move.

    The search covers parameters, buffers and tensors that are plain attributes, also of submodules.

    Args:
        module: an MoE layer; best the part of it with the experts alone.
        registered: the tensors that move, or views of them.
        slots: slots on this rank.
        name: of the module, a prefix for the names of its tensors.
    """
    moved = [memory_span(tensor) for tensor in registered]
    found = []
    for own_name, tensor in _tensors(module, name):
        if not _has_slots(tensor, slots):
            continue
        device, start, end = memory_span(tensor)
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
        numbers: of the layers; None is 0, 1 and so on.
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
                yield from inner_tensors(f"{prefix}.{key}" if prefix else key, value)


def _has_slots(tensor: torch.Tensor, slots: int) -> bool:
    if tensor.layout != torch.strided or tensor.is_meta or not tensor.numel() or not tensor.dim():
        return False
    is_map = tensor.dim() == 1 and tensor.dtype in (torch.int32, torch.int64)
    return tensor.shape[0] == slots and not is_map


def _differs_by_slot(tensor: torch.Tensor, slots: int) -> bool:
    if tensor.stride(0) == 0:
        return False
    try:
        rows = byte_rows(tensor, "tensor", slots)
    except TransferError:  # rows that cannot be compared
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
