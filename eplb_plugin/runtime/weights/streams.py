"""Order between the serving thread and the background where weights are on an accelerator."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

__all__ = ["DeviceOrder"]


class DeviceOrder:
    """A stream for the background thread that runs beside the engine's and knows what it has to wait for.

    On the CPU there is nothing to order and every method does nothing.

    Args:
        device: where weights and counts are.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        if self._cuda:
            self._device = device
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._written = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self.mark()

    def mark(self) -> None:
        """The serving thread: what it has issued so far is what the background may read."""
        if self._cuda:
            self._written.record(torch.cuda.current_stream(self._device))

    def rejoin(self) -> None:
        """The serving thread: let what comes next wait for what was done in the background's place."""
        if self._cuda:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    @contextlib.contextmanager
    def background(self) -> Iterator[None]:
        """The background thread: its work goes to the stream, after all that was marked."""
        if not self._cuda:
            yield
            return
        # The current device belongs to a thread, and new threads start with the first one.
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            yield

    def catch_up(self) -> None:
        """The background thread: let what comes next wait for what was marked last."""
        if self._cuda:
            self._stream.wait_event(self._written)

    def settle(self) -> None:
        """The background thread: wait until the device has done all of its work."""
        if self._cuda:
            self._stream.synchronize()
