"""A search at the start for unregistered tensors with a row for each slot of a layer.

An unregistered tensor does not move with its expert, and answers are wrong without an error. The search
covers modules, and the objects and containers that they refer to. Example: a vector that a quantisation
derives from weights once, and keeps in a configuration of its own. The search is a heuristic.

False alarms are possible:
- router tensors per logical expert (its weight, `e_score_correction_bias`), if a rank has as many slots as
  there are experts;
- any tensor of the module with as many rows as the rank has slots, or with one row if a rank has one slot;
- copies that the layer no longer uses.

Tensors of experts that it does not find:
- tensors more than six objects away from a module, in closures, or in objects without `__dict__`;
- integers [slots] (int32, int64): expert maps and counters look like that, zero points seldom do;
- values equal for all slots of a rank: shared activation scales, work space;
- tensors between the rows of a registered one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import FunctionType, MethodType, ModuleType
from typing import TypeAlias

import torch

from ...core.errors import TransferError
from ..control.rank_group import RankGroup
from ..weights.expert_weights import byte_rows, inner_tensors, memory_span

__all__ = ["describe_unregistered", "find_unregistered", "search_unregistered", "unregistered_tensors"]

_DEPTH = 6
"""Objects and containers between a module and a tensor, at most. vLLM: method, configuration, descriptor."""

_LEAVES = (torch.nn.Module, type, ModuleType, FunctionType, MethodType, str, bytes, int, float, torch.dtype)
"""Not looked into. The search begins at the submodules, and other modules belong to other layers."""

Seen: TypeAlias = dict[int, tuple[object, int]]
"""What was looked at, by identity: the object, which this keeps alive, and the depth left there."""


def unregistered_tensors(
    module: torch.nn.Module,
    registered: Sequence[torch.Tensor],
    slots: int,
    name: str = "",
    seen: Seen | None = None,
) -> list[str]:
    """Names, shapes and dtypes of the tensors of a layer that have a row for each slot and do not move.

    The search covers parameters, buffers and plain attributes, also of submodules: tensors, and objects and
    containers with tensors in them. A list of as many tensors as there are slots counts as one tensor.

    Args:
        module: an MoE layer; best the part of it with the experts alone.
        registered: the tensors that move, or views of them.
        slots: slots on this rank.
        name: of the module, a prefix for the names of its tensors.
        seen: objects that other layers have shown, which are skipped.
    """
    moved = [memory_span(tensor) for tensor in registered]
    found = []
    for own_name, rows in _rows(module, name, slots, {} if seen is None else seen):
        if any(_overlaps(memory_span(row), span) for row in rows for span in moved):
            continue
        if slots == 1 or _differs_by_slot(rows, slots):
            count = f"{slots} of " if len(rows) > 1 else ""
            kind = str(rows[0].dtype).removeprefix("torch.")
            found.append(f"{own_name} {count}{tuple(rows[0].shape)} {kind}")
    return found


def find_unregistered(
    modules: Sequence[torch.nn.Module],
    weights: Sequence[Sequence[torch.Tensor]],
    slots: int,
    numbers: Sequence[int] | None = None,
) -> dict[str, list[int]]:
    """All `unregistered_tensors` of a rank, and for each the layers that have it.

    Args:
        modules: for each MoE layer, the module that holds its experts.
        weights: for each of them, the tensors that move.
        slots: slots on this rank.
        numbers: of the layers; None is 0, 1 and so on.
    """
    layers_of: dict[str, list[int]] = defaultdict(list)
    numbers = range(len(modules)) if numbers is None else numbers
    seen: Seen = {}
    for number, module, registered in zip(numbers, modules, weights, strict=True):
        for tensor in unregistered_tensors(module, registered, slots, seen=seen):
            layers_of[tensor].append(number)
    return dict(layers_of)


def describe_unregistered(found_by_rank: Iterable[Mapping[str, Sequence[int]]]) -> str:
    """One line for what `find_unregistered` has found on all ranks together; empty for nothing."""
    layers_of: dict[str, set[int]] = defaultdict(set)
    for found in found_by_rank:
        for tensor, layers in found.items():
            layers_of[tensor].update(layers)
    tensors_of: dict[str, list[str]] = defaultdict(list)
    for tensor, numbers in layers_of.items():
        tensors_of[_ranges(sorted(numbers))].append(tensor)
    if not tensors_of:
        return ""
    named = "; ".join(f"{layers}: {', '.join(tensors)}" for layers, tensors in tensors_of.items())
    return (
        "tensors with a row for each slot do not move with the experts; if they belong to experts, answers "
        f"are wrong after a rebalance: {named}"
    )


def search_unregistered(
    group: RankGroup,
    modules: Sequence[torch.nn.Module],
    weights: Sequence[Sequence[torch.Tensor]],
    slots: int,
    numbers: Sequence[int] | None = None,
) -> str:
    """All ranks together, each with its own modules or with none: `find_unregistered`, described in one line.

    Raises:
        EplbError: on all ranks, if one of them cannot search. RankLostError: another rank did not answer.
    """

    def search() -> dict[str, list[int]]:
        return find_unregistered(modules, weights, slots, numbers)

    found = group.attempt("looking for tensors that would not move", search)
    return describe_unregistered(group.collect(found))


def _rows(
    module: torch.nn.Module, name: str, slots: int, seen: Seen
) -> Iterator[tuple[str, Sequence[torch.Tensor]]]:
    """Every tensor with a row for each slot, once, by its first name: itself, or its rows if it is a list."""
    for prefix, part in module.named_modules(prefix=name):
        for key, value in [*part._parameters.items(), *part._buffers.items(), *vars(part).items()]:
            if key not in ("_parameters", "_buffers", "_modules"):
                yield from _rows_within(f"{prefix}.{key}" if prefix else key, value, slots, seen, _DEPTH)


def _rows_within(
    name: str, value: object, slots: int, seen: Seen, depth: int
) -> Iterator[tuple[str, Sequence[torch.Tensor]]]:
    """Those of one attribute, and of what it refers to."""
    if value is None or isinstance(value, _LEAVES):
        return
    is_tensor = isinstance(value, torch.Tensor)
    if id(value) in seen and (is_tensor or seen[id(value)][1] >= depth):
        return
    seen[id(value)] = value, depth
    if isinstance(value, torch.Tensor):
        for own_name, tensor in inner_tensors(name, value):
            if _has_slots(tensor, slots):
                yield own_name, [tensor]
        return
    if not depth:
        return
    parts: Iterable[tuple[str, object]]
    if isinstance(value, list | tuple):
        if _is_list_of_slots(value, slots):
            yield name, value
            return
        parts = ((f"{name}[{place}]", part) for place, part in enumerate(value))
    elif isinstance(value, dict):
        parts = (
            (f"{name}[{key!r}]", part) for key, part in list(value.items()) if isinstance(key, str | int)
        )
    else:
        parts = ((f"{name}.{key}", part) for key, part in list(getattr(value, "__dict__", {}).items()))
    for own_name, part in parts:
        yield from _rows_within(own_name, part, slots, seen, depth - 1)


def _is_list_of_slots(values: Sequence[object], slots: int) -> bool:
    """Whether a list holds one tensor for each slot, alike in shape and dtype."""
    first = values[0] if values else None
    return (
        len(values) == slots > 1
        and isinstance(first, torch.Tensor)
        and first.layout == torch.strided
        and not first.is_meta
        and first.numel() > 0
        and all(
            isinstance(value, torch.Tensor) and (value.shape, value.dtype) == (first.shape, first.dtype)
            for value in values
        )
    )


def _overlaps(one: tuple[torch.device, int, int], other: tuple[torch.device, int, int]) -> bool:
    return one[0] == other[0] and one[1] < other[2] and other[1] < one[2]


def _has_slots(tensor: torch.Tensor, slots: int) -> bool:
    if tensor.layout != torch.strided or tensor.is_meta or not tensor.numel() or not tensor.dim():
        return False
    is_map = tensor.dim() == 1 and tensor.dtype in (torch.int32, torch.int64)
    return tensor.shape[0] == slots and not is_map


def _differs_by_slot(tensors: Sequence[torch.Tensor], slots: int) -> bool:
    """Whether slots differ in a tensor [slots, ...], or in a list of one tensor for each slot."""
    try:
        if len(tensors) > 1:
            rows = [byte_rows(tensor.unsqueeze(0), "tensor", 1)[0] for tensor in tensors]
        elif tensors[0].stride(0) == 0:
            return False
        else:
            rows = list(byte_rows(tensors[0], "tensor", slots))
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
