"""What stands in for an accelerator: the platform check, streams and events."""

import time
from types import SimpleNamespace

import torch


class Stand:
    """`original`, with some of its attributes replaced."""

    def __init__(self, original, **replaced):
        self.__dict__.update(replaced, _original=original)

    def __getattr__(self, name):
        return getattr(self._original, name)


class Stream:
    """Work on a CPU is done when the call returns."""

    def __init__(self, device=None):
        self.device = device

    def synchronize(self):
        pass

    def wait_stream(self, stream):
        pass

    def wait_event(self, event):
        pass


class Event:
    """Takes the time when it is recorded."""

    def __init__(self, device=None, *, enable_timing=False, **_):
        self.time = None

    def record(self, stream=None):
        self.time = time.perf_counter()

    def wait(self, stream=None):
        pass

    def synchronize(self):
        pass

    def query(self):
        return True

    def elapsed_time(self, end):
        return (end.time - self.time) * 1000


def on_cpu_platform():
    """(1) The only check of the platform in this module is the one that refuses EPLB."""
    from vllm.config import parallel

    parallel.current_platform = Stand(parallel.current_platform, is_cuda_alike=lambda: True)


def with_cpu_streams():
    """(2) `torch` as the modules of EPLB see it."""
    from vllm.distributed.eplb import async_worker, eplb_communicator, eplb_state, eplb_utils

    accelerator = SimpleNamespace(
        is_available=lambda: False,
        current_accelerator=lambda: torch.device("cpu"),
        set_device_index=lambda index: None,
        current_device_index=lambda: 0,
        current_stream=Stream,
        set_stream=lambda stream: None,
        synchronize=lambda: None,
    )
    stand = Stand(torch, Event=Event, Stream=Stream, accelerator=accelerator)
    for module in (async_worker, eplb_communicator, eplb_state, eplb_utils):
        module.torch = stand
