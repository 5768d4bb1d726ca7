"""The load window: tokens of every expert in the recent steps, recorded without stalling the engine."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import torch

from ..core.errors import LoadError, checked_integer

__all__ = ["IntervalLoad", "LoadWindow"]

_ID_DTYPES = (torch.int32, torch.int64)


class IntervalLoad(NamedTuple):
    """The load of one interval.

    Attributes:
        snapshots: int64 [snapshots, layers, logical], tokens, sums of steps in time order.
        samples: int64 [samples, layers, logical], tokens of single steps, evenly spaced.
    """

    snapshots: torch.Tensor
    samples: torch.Tensor


class LoadWindow:
    """Counts the tokens of every expert, step by step, and keeps the recent intervals as snapshots.

    The steps of an interval are folded into `snapshots` sums in time order: 1000 steps and 32 snapshots make
    31 or 32 steps each. `take` ends an interval, the caller sums it over ranks, and `push` adds it to the
    history.

    `record` and `step` issue device work only, so a graph can capture them. They never wait for the device.
    They allocate nothing for a batch size that was seen or reserved before. A larger batch gets larger
    buffers; the smaller ones are kept, since graphs may write to them.

    Args:
        num_layers: MoE layers of the model.
        num_logical: logical experts per layer.
        interval: steps of one interval.
        snapshots: per interval; fewer if the interval has fewer steps.
        samples: single steps kept of an interval, evenly spaced; fewer if it has fewer steps.
        history: intervals kept.
        device: of expert ids and counts.

    Attributes:
        steps: since the last `take`, dummy steps included.

    Raises:
        LoadError: a number is not an integer, or below 1.
    """

    def __init__(
        self,
        num_layers: int,
        num_logical: int,
        *,
        interval: int,
        snapshots: int = 32,
        samples: int = 0,
        history: int = 4,
        device: torch.device | str = "cpu",
    ) -> None:
        self.num_layers = num_layers = checked_integer("num_layers", num_layers, LoadError)
        self.num_logical = num_logical = checked_integer("num_logical", num_logical, LoadError)
        self.interval = interval = checked_integer("interval", interval, LoadError)
        snapshots = checked_integer("snapshots", snapshots, LoadError)
        history = checked_integer("history", history, LoadError)
        samples = checked_integer("samples", samples, LoadError, least=0)
        self._num_snapshots, self._num_samples = min(snapshots, interval), min(samples, interval)
        self.steps = 0
        self._history: deque[IntervalLoad] = deque(maxlen=history)
        # Not inference tensors, whatever the mode of the caller: those refuse writes outside of it.
        with torch.inference_mode(False):
            # The step under way. Bin 0 takes what is not counted: ids of -1 and masked tokens.
            self._step = torch.zeros(num_layers, num_logical + 1, dtype=torch.int64, device=device)
            self._snapshots = torch.zeros(
                self._num_snapshots, num_layers, num_logical, dtype=torch.int64, device=device
            )
            self._samples = self._snapshots.new_zeros(self._num_samples, num_layers, num_logical)
            # One element, read n times: the source of every scatter-add. A Python number in the shift would
            # cost a temporary tensor.
            self._one = torch.ones(1, dtype=torch.int64, device=device)
            self._ids = torch.empty(0, dtype=torch.int64, device=device)
            self._mask = torch.empty(0, dtype=torch.int64, device=device)
            self._outgrown: list[torch.Tensor] = []  # captured graphs hold their addresses
        self.device = self._step.device
        self._bins = list(self._step.unbind(0))
        self._counts = list(self._step[:, 1:].unbind(0))

    def reserve(self, num_ids: int) -> None:
        """Make room for batches of `num_ids` = tokens x top_k ids, for example before a graph is captured.

        Sizes are powers of two, so all outgrown buffers together take no more memory than the current one.
        """
        if num_ids > self._ids.numel():
            size = 1 << (num_ids - 1).bit_length()
            self._outgrown += [self._ids, self._mask]
            with torch.inference_mode(False):
                self._ids = torch.empty(size, dtype=torch.int64, device=self.device)
                self._mask = torch.empty(size, dtype=torch.int64, device=self.device)

    def record(self, layer: int, expert_ids: torch.Tensor, valid: torch.Tensor | None = None) -> None:
        """Count the tokens that one layer routed in the current step.

        Args:
            layer: index of the MoE layer.
            expert_ids: int32 or int64 [tokens, top_k] or [tokens], logical experts; -1 is not counted.
            valid: bool [tokens], False for padding; None counts every token.

        Raises:
            LoadError: wrong shape, dtype, device or layer. Ids beyond the experts raise torch's index
                error, on CUDA asynchronously.
        """
        self._check_layer(layer)
        if expert_ids.dtype not in _ID_DTYPES or expert_ids.dim() not in (1, 2):
            raise LoadError(
                f"expert_ids is {expert_ids.dtype} {tuple(expert_ids.shape)}, "
                "not int32 or int64 [tokens, top_k] or [tokens]"
            )
        self._check_device("expert_ids", expert_ids)
        num_ids = expert_ids.numel()
        if num_ids > self._ids.numel():
            self.reserve(num_ids)
        flat = self._ids[:num_ids]
        shifted = flat.view(expert_ids.shape)
        shifted.copy_(expert_ids).add_(self._one)
        if valid is not None:
            tokens = expert_ids.shape[0]
            if valid.shape != (tokens,) or valid.dtype != torch.bool:
                raise LoadError(f"valid is {valid.dtype} {tuple(valid.shape)}, not bool ({tokens},)")
            self._check_device("valid", valid)
            mask = self._mask[:tokens]
            mask.copy_(valid)
            shifted.mul_(mask if expert_ids.dim() == 1 else mask.unsqueeze(1))
        self._bins[layer].scatter_add_(0, flat, self._one.expand(num_ids))

    def record_counts(self, layer: int, counts: torch.Tensor) -> None:
        """Add counts of the engine's own, integer [logical], tokens, to the current step.

        Values are not checked here, since that would wait for the device. `plan` refuses a snapshot whose sum
        over steps and ranks is negative.

        Raises:
            LoadError: wrong shape, dtype, device or layer.
        """
        self._check_layer(layer)
        if counts.shape != (self.num_logical,) or counts.is_floating_point() or counts.dtype == torch.bool:
            wanted = f"integers ({self.num_logical},)"
            raise LoadError(f"counts is {counts.dtype} {tuple(counts.shape)}, not {wanted}")
        self._check_device("counts", counts)
        self._counts[layer].add_(counts)

    def step(self, is_dummy: bool = False) -> None:
        """End a step. The counts of a dummy step (warm-up, idle ranks) are dropped.

        It counts as a step all the same, so that ranks with and without work end an interval together.
        """
        if not is_dummy:
            sample = self._samples_of(self.steps)
            if self._samples_of(self.steps + 1) > sample:
                self._samples[sample].copy_(self._step[:, 1:])
            snapshot = min(self.steps * self._num_snapshots // self.interval, self._num_snapshots - 1)
            self._snapshots[snapshot].add_(self._step[:, 1:])
        self._step.zero_()
        self.steps += 1

    def take(self) -> IntervalLoad:
        """End the interval: its counts on this rank.

        Snapshots and samples without steps are left out, so ranks with equally many steps get the same shape.
        The tensors belong to the caller; counting starts anew.
        """
        last = (self.steps - 1) * self._num_snapshots // self.interval
        used = min(last + 1, self._num_snapshots)
        taken = IntervalLoad(
            self._snapshots[:used].clone(), self._samples[: self._samples_of(self.steps)].clone()
        )
        self._restart()
        return taken

    def push(self, interval_load: torch.Tensor, samples: torch.Tensor | None = None) -> None:
        """Add an interval summed over ranks to the history.

        Args:
            interval_load: its snapshots, int64 [snapshots, layers, logical].
            samples: its single steps, int64 [samples, layers, logical]; None: none.

        Values are not checked, see `record_counts`.

        Raises:
            LoadError: another dtype, or its layers or experts are not the window's.
        """
        samples = self._samples[:0] if samples is None else samples
        for name, part in (("interval_load", interval_load), ("samples", samples)):
            if part.dtype != torch.int64:
                raise LoadError(f"{name} has dtype {part.dtype}, not int64")
            if part.dim() != 3 or part.shape[1:] != (self.num_layers, self.num_logical):
                raise LoadError(
                    f"{name} has shape {tuple(part.shape)}, "
                    f"not [any number, {self.num_layers}, {self.num_logical}]"
                )
        if interval_load.shape[0]:
            self._history.append(IntervalLoad(interval_load, samples))

    def load(self) -> torch.Tensor:
        """The whole window, int64 [snapshots, layers, logical] in time order; no snapshots before the
        first `push`."""
        parts = [interval.snapshots for interval in self._history]
        return torch.cat(parts) if parts else self._snapshots[:0]

    def samples(self) -> torch.Tensor:
        """The single steps of the window, int64 [samples, layers, logical] in time order."""
        parts = [interval.samples for interval in self._history]
        return torch.cat(parts) if parts else self._samples[:0]

    def clear(self) -> None:
        """Forget everything; to be called on all ranks alike, for instance when the group changes."""
        self._history.clear()
        self._step.zero_()
        self._restart()

    def _restart(self) -> None:
        self._snapshots.zero_()
        self._samples.zero_()
        self.steps = 0

    def _samples_of(self, steps: int) -> int:
        """Samples taken in the first `steps` steps of an interval."""
        return min(-(-steps * self._num_samples // self.interval), self._num_samples)

    def _check_layer(self, layer: int) -> None:
        if not 0 <= layer < self.num_layers:
            raise LoadError(f"layer={layer} is outside 0..{self.num_layers - 1}")

    def _check_device(self, name: str, tensor: torch.Tensor) -> None:
        # A copy from another device would wait for the host.
        if tensor.device != self.device:
            raise LoadError(f"{name} is on {tensor.device}, the window on {self.device}")
