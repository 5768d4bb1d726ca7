"""These tests need SGLang: `make test-sglang` sets up an environment of its own. Elsewhere there are none."""

import importlib.util
import os
import runpy
import sys
from pathlib import Path

import pytest

import eplb_plugin

SHIMS = Path(__file__).parent / "shims"

collect_ignore_glob = [] if importlib.util.find_spec("sglang") else ["*.py"]

if not collect_ignore_glob:
    # Read by SGLang when it is imported, here and in the processes that the tests start.
    os.environ.update(
        PYTHONPATH=str(SHIMS),
        SGLANG_USE_CPU_ENGINE="1",
        SGLANG_CPU_OMP_THREADS_BIND="0|1",
        SGLANG_EXPERT_LOCATION_UPDATER_CANARY="1",
        OMP_NUM_THREADS="1",
        TOKENIZERS_PARALLELISM="false",
        # Environments with another numba, working on the same checkout, must not write into one cache.
        NUMBA_CACHE_DIR=str(Path(sys.prefix) / "numba"),
    )
    if str(SHIMS) not in sys.path:
        # Processes that the tests start find all this by themselves.
        sys.path.insert(0, str(SHIMS))
        runpy.run_path(str(SHIMS / "sitecustomize.py"))


@pytest.fixture(scope="session", autouse=True)
def compiled():
    """Compile the planner once, into the cache on disk, before ranks that start together all do."""
    eplb_plugin.warmup()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The tiny model, saved, and what transformers decodes with it."""
    from tests.engines.sglang.tiny_model import make_model

    return make_model(tmp_path_factory.mktemp("model"))
