"""Order between the serving thread and the background thread on an accelerator."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

__all__ = ["DeviceOrder"]


class DeviceOrder:
    """A CUDA stream of the background thread, ordered with the stream of the engine by events.

    On the CPU every method does nothing. `device`: of weights and token counts.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        if self._cuda:
            self._device = device
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._written = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self.mark()

    def mark(self) -> None:
        """Serving thread: the background may read all results of the work issued so far."""
        if self._cuda:
            self._written.record(torch.cuda.current_stream(self._device))

    def rejoin(self) -> None:
        """Serving thread: its next work waits for the work of the background's stream."""
        if self._cuda:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    @contextlib.contextmanager
    def background(self) -> Iterator[None]:
        """Background thread: its work within goes to its own stream."""
        if not self._cuda:
            yield
            return
        # The current device belongs to a thread; new threads start with device 0.
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            yield

    def catch_up(self) -> None:
        """Background thread: its next work waits for the last `mark`."""
        if self._cuda:
            self._stream.wait_event(self._written)

    def settle(self) -> None:
        """Background thread: wait until the device has done all of its work."""
        if self._cuda:
            self._stream.synchronize()
