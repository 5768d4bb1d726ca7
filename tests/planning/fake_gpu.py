"""Tensors on a GPU that is not there, and what would make the host wait for it.

Fake tensors have a device and shapes, but no values.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Either the next launch depends on a value, or the number of results does.
WAITING = {
    *("_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "nonzero", "argwhere"),
    *("masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive", "bincount", "histc"),
}
FROM_HOST = {"lift_fresh", "lift_fresh_copy"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


class WaitError(Exception):
    """Named after the operation."""


class Watch(TorchDispatchMode):
    """Counts operations, and raises WaitError at one on which a GPU would make the host wait.

    Args:
        from_host: whether tensors made of Python data count: on the CPU they come from numpy as well.
    """

    def __init__(self, from_host: bool = False) -> None:
        super().__init__()
        self.ops = 0
        self._waiting = WAITING | (FROM_HOST if from_host else set())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        self.ops += 1
        if self._waits(name, func._overloadname, args, kwargs):
            raise WaitError(name)
        return func(*args, **kwargs)

    def _waits(self, name: str, overload: str, args: tuple, kwargs: dict) -> bool:
        if name in self._waiting:
            return True
        if name == "repeat_interleave" and overload == "Tensor":
            return kwargs.get("output_size") is None
        if name in INDEXING:
            return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
        if name == "_to_copy":
            return torch.device(kwargs.get("device") or args[0].device).type != args[0].device.type
        return name == "copy_" and args[0].device.type != args[1].device.type


_PLAIN = {
    torch.Tensor.contiguous: torch.ops.aten.contiguous.default,
    torch.Tensor.__invert__: torch.ops.aten.bitwise_not.default,
}


class _Brackets(TorchFunctionMode):
    """Brackets and the like by other operations, since torch's own ask for the driver of the device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.__getitem__:
            return _part(*args)
        if func is torch.Tensor.__setitem__:
            return torch.ops.aten.copy_.default(_part(*args[:2]), args[2])
        if func in _PLAIN:
            return _PLAIN[func](*args)
        return func(*args, **(kwargs or {}))


def _part(x: torch.Tensor, key: object) -> torch.Tensor:
    keys = list(key) if isinstance(key, tuple) else [key]
    if Ellipsis in [k for k in keys if not isinstance(k, torch.Tensor)]:
        at = next(i for i, k in enumerate(keys) if k is Ellipsis)
        taken = sum(k is not None and k is not Ellipsis for k in keys)
        keys[at : at + 1] = [slice(None)] * (x.dim() - taken)
    dim, indices = 0, []
    for k in keys:
        if isinstance(k, int):
            x = x.select(dim, k)
            continue
        indices.append(k if isinstance(k, torch.Tensor) else None)
        if k is None:
            x = x.unsqueeze(dim)
        elif isinstance(k, slice):
            start, stop, step = k.indices(x.shape[dim])
            x = torch.ops.aten.slice.Tensor(x, dim, start, stop, step)
        dim += 1
    return torch.ops.aten.index.Tensor(x, indices) if any(i is not None for i in indices) else x


@contextmanager
def fake_gpu():
    """Within, `device="cuda"` makes fake tensors; gives the `Watch` over what is done with them."""
    with FakeTensorMode(), Watch(from_host=True) as watch, _Brackets():
        yield watch
