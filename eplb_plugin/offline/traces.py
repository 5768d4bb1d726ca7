"""`LoadTrace` and `TokenTrace`: recorded loads and recorded expert choices, validated and frozen."""

from __future__ import annotations

import reprlib
from bisect import bisect_left
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from ..core.errors import TraceError

__all__ = ["MAX_CELLS", "MAX_COUNT", "LoadTrace", "TokenTrace", "as_load", "check_layer_ids"]

MAX_COUNT = 2**53
"""Maximum count: planning computes in float64, which is exact up to here."""

MAX_CELLS = 2**31
"""Maximum number of values of a derived load: a small file can ask for a huge one."""

_Array = np.ndarray[Any, Any]

# Memory grows with these numbers of a file, however small the file is.
_MAX_LAYER = _MAX_EXPERTS = 2**16


@dataclass(frozen=True, eq=False)
class LoadTrace:
    """The load of each step of a run, or of a few steps at a time with some single steps among them.

    Attributes:
        load: [steps, layers, experts], tokens; int32, int64, float32 or float64, on the CPU.
        name: origin of the load, for titles and errors.
        layer_ids: layer of the model of each row, rising; by default 0, 1, ... Engines number dense layers
            too: the first MoE layer of DeepSeek-V3 is 3.
        samples: [samples, layers, experts], tokens of single steps in time order, for a `load` of sums over
            several steps. None: the steps of `load` are single ones.
        sample_steps: for each sample its "step" of `load`; never falling.
        engine_steps: forward steps of the engine in one "step" of `load`, on average.

    Raises:
        TraceError: wrong shape or dtype, no elements, NaN, infinite or negative values, layer ids that do not
            rise, or samples that do not fit the load.
    """

    load: torch.Tensor
    name: str = "load"
    layer_ids: tuple[int, ...] = ()
    samples: torch.Tensor | None = None
    sample_steps: tuple[int, ...] = ()
    engine_steps: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.load, torch.Tensor):
            raise TraceError(f"{self.name}: load is a {type(self.load).__name__}, not a tensor")
        if self.load.dim() != 3 or self.load.numel() == 0:
            shape = tuple(self.load.shape)
            raise TraceError(f"{self.name}: load has shape {shape}, not [steps, layers, experts]")
        if self.load.dtype not in (torch.int32, torch.int64, torch.float32, torch.float64):
            raise TraceError(f"{self.name}: load has dtype {self.load.dtype}, not int32/64 or float32/64")
        bad = ~(torch.isfinite(self.load) & (self.load >= 0))
        if bool(bad.any()):
            step, layer, expert = (int(x) for x in bad.nonzero()[0])
            place = f"step {step}, layer {layer}, expert {expert}"
            raise TraceError(
                f"{self.name}: load of {place} is {self.load[step, layer, expert].item()}; "
                f"{int(bad.sum())} of {bad.numel()} values are NaN, infinite or negative"
            )
        layer_ids = self.layer_ids or tuple(range(self.num_layers))
        check_layer_ids(self.name, layer_ids, self.num_layers)
        object.__setattr__(self, "layer_ids", layer_ids)
        self._check_samples()

    def _check_samples(self) -> None:
        samples, steps = self.samples, self.sample_steps
        if samples is None:
            return
        if samples.dim() != 3 or samples.shape[1:] != self.load.shape[1:] or len(samples) != len(steps):
            raise TraceError(
                f"{self.name}: samples {tuple(samples.shape)} of {len(steps)} steps do not fit a load "
                f"{tuple(self.load.shape)}"
            )
        if samples.dtype not in (torch.int32, torch.int64) or (samples.numel() and int(samples.min()) < 0):
            raise TraceError(f"{self.name}: samples are {samples.dtype}, not integers of 0 or above")
        if any(a > b for a, b in pairwise((0, *steps, self.num_steps - 1))):
            raise TraceError(f"{self.name}: sample_steps {reprlib.repr(steps)} fall, or leave the load")

    def part(self, first: int, end: int) -> LoadTrace:
        """The steps `first` to `end`, with their samples."""
        chosen = range(bisect_left(self.sample_steps, first), bisect_left(self.sample_steps, end))
        return replace(
            self,
            load=self.load[first:end].contiguous(),
            samples=None if self.samples is None else self.samples[chosen.start : chosen.stop],
            sample_steps=tuple(self.sample_steps[at] - first for at in chosen),
        )

    @property
    def single_steps(self) -> torch.Tensor:
        """[single steps, layers, experts], tokens: the samples, where there are some; else `load`."""
        return self.load if self.samples is None else self.samples

    @property
    def length(self) -> str:
        """For titles: `40 steps`, or `96 sums of 31.2 steps`."""
        if self.engine_steps == 1:
            return f"{self.num_steps} step{'' if self.num_steps == 1 else 's'}"
        return f"{self.num_steps} sums of {self.engine_steps:.4g} steps"

    @property
    def num_steps(self) -> int:
        return self.load.shape[0]

    @property
    def num_layers(self) -> int:
        return self.load.shape[1]

    @property
    def num_experts(self) -> int:
        return self.load.shape[2]


@dataclass(frozen=True, eq=False)
class TokenTrace:
    """The experts of each token of some requests.

    Attributes:
        topk_ids: integer [tokens, layers, top_k], the chosen experts, in `0..num_experts-1`.
        request: int64 [tokens], request of each token, sorted; the tokens of a request are in order of
            computation.
        category: text or integer [requests], topic of each request.
        num_experts: logical experts per layer.
        name: origin of the trace, for titles and errors.
        first: int64 [requests + 1], derived: request `r` has the tokens `first[r]..first[r+1]-1`.

    Raises:
        TraceError: wrong shape or dtype, an id out of range, or unsorted requests.
    """

    topk_ids: _Array
    request: _Array
    category: _Array
    num_experts: int
    name: str = "tokens"
    first: _Array = field(init=False, repr=False)

    def __post_init__(self) -> None:
        ids, request, category = self.topk_ids, self.request, self.category
        for name, array, fits, kinds, expected in (
            ("topk_ids", ids, ids.ndim == 3 and ids.size, "iu", "integers [tokens, layers, top_k]"),
            ("request", request, request.shape == ids.shape[:1], "iu", "integers [tokens]"),
            ("category", category, category.ndim == 1, "iuSU", "text or integers [requests]"),
        ):
            if not fits or array.dtype.kind not in kinds:
                raise TraceError(f"{self.name}: {name} is {array.dtype} {array.shape}, not {expected}")
        if not 1 <= self.num_experts <= _MAX_EXPERTS:
            raise TraceError(f"{self.name}: num_experts={self.num_experts} is outside 1..{_MAX_EXPERTS}")
        self._check_range("topk_ids", ids, self.num_experts, "num_experts")
        self._check_range("request", request, len(category), "requests in category")
        request = request.astype(np.int64)
        fall = np.flatnonzero(np.diff(request) < 0)
        if fall.size:
            token = int(fall[0]) + 1
            raise TraceError(
                f"{self.name}: request is not sorted: token {token} belongs to request {request[token]}, "
                f"the token before it to {request[token - 1]}"
            )
        object.__setattr__(self, "request", request)
        if ids.dtype.itemsize == 8:
            # NumPy adds int64 and uint64 as floats.
            object.__setattr__(self, "topk_ids", ids.astype(np.int64))
        object.__setattr__(self, "first", np.searchsorted(request, np.arange(len(category) + 1)))

    def _check_range(self, name: str, values: _Array, bound: int, what: str) -> None:
        if int(values.min()) >= 0 and int(values.max()) < bound:
            return
        place = tuple(int(x) for x in np.argwhere((values < 0) | (values >= bound))[0])
        raise TraceError(
            f"{self.name}: {name}[{', '.join(map(str, place))}]={int(values[place])} is outside "
            f"0..{bound - 1} ({what}: {bound})"
        )

    @property
    def num_tokens(self) -> int:
        return int(self.topk_ids.shape[0])

    @property
    def num_layers(self) -> int:
        return int(self.topk_ids.shape[1])

    @property
    def top_k(self) -> int:
        return int(self.topk_ids.shape[2])

    @property
    def lengths(self) -> _Array:
        """int64 [requests]: tokens of each request, 0 or more."""
        return np.diff(self.first)


def check_layer_ids(name: str, layer_ids: tuple[int, ...], num_layers: int) -> None:
    """Raise TraceError unless there is one number for each layer, and they rise from 0 or above."""
    if len(layer_ids) != num_layers:
        raise TraceError(f"{name}: {len(layer_ids)} layer_ids for {num_layers} layers")
    if layer_ids[0] < 0 or any(a >= b for a, b in pairwise(layer_ids)):
        raise TraceError(f"{name}: layer_ids {reprlib.repr(layer_ids)} do not rise from 0 or above")
    if layer_ids[-1] >= _MAX_LAYER:
        raise TraceError(f"{name}: layer_ids go up to {layer_ids[-1]}, not below {_MAX_LAYER}")


def as_load(array: _Array, name: str) -> torch.Tensor:
    """Convert an array exactly to a dtype of `LoadTrace` in native byte order; `name` is for errors.

    Raises:
        TraceError: not a number dtype, or a count above `MAX_COUNT`.
    """
    if array.dtype.kind == "f" and array.dtype.itemsize <= 8:
        dtype = np.float64 if array.dtype.itemsize == 8 else np.float32
        return torch.from_numpy(array.astype(dtype))
    if array.dtype.kind not in "iu":
        raise TraceError(
            f"{name}: load has dtype {array.dtype}, not an integer or a float of at most 64 bits"
        )
    peak = int(array.max()) if array.size else 0
    if peak > MAX_COUNT:
        raise TraceError(f"{name}: load has the value {peak}, above {MAX_COUNT}")
    return torch.from_numpy(array.astype(np.int32 if peak < 2**31 and array.itemsize <= 4 else np.int64))
