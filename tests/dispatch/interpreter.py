"""A process in which Triton interprets its kernels, on CPU tensors. Triton must not be imported before."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

LIMIT = 120.0  # seconds for one call


@contextmanager
def interpreter() -> Iterator[Callable[..., Any]]:
    """Calls a function at the top of a module there. What it raises is raised here."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_interpret) as pool:
        yield lambda function, *args: pool.submit(function, *args).result(LIMIT)


def _interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    from triton.runtime.interpreter import interpreter_builder

    # An overflow is an error.
    interpreter_builder.options = dataclasses.replace(interpreter_builder.options, debug=True)
