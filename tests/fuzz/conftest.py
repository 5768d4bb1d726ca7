"""What no input may do, whatever else a test looks at: take absurd memory, or leave something changed."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import numpy as np
import pytest
import torch

from .parsers import without_our_variables

_MOST_MEMORY = 3 * 2**30


@pytest.fixture(autouse=True)
def _bounded_memory():
    """Memory beyond what the process has already, and the bound, cannot be had: asking for it is an error."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + _MOST_MEMORY, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.fixture(autouse=True)
def _nothing_changes():
    before = dict(os.environ)
    without_our_variables()
    environment, folder = _environment(), Path.cwd()
    numbers, more_numbers = torch.get_rng_state(), np.random.get_state()[1].copy()
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    yield
    assert _environment() == environment
    assert Path.cwd() == folder
    assert torch.equal(torch.get_rng_state(), numbers)
    assert np.array_equal(np.random.get_state()[1], more_numbers)
    assert (torch.get_default_dtype(), torch.get_num_threads()) == (dtype, threads)
    os.environ.update(before)


def _environment():
    return {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
