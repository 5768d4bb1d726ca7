"""These tests need SGLang: `make test-sglang` sets up an environment of its own. Elsewhere there are none."""

import importlib.util
import os
import runpy
import sys
from pathlib import Path

import pytest

import eplb_plugin
from tests.engines.compiled import choose_cache
from tests.engines.forked import preload

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
    )
    choose_cache()
    if str(SHIMS) not in sys.path:
        # Processes that the tests start find all this by themselves.
        sys.path.insert(0, str(SHIMS))
        runpy.run_path(str(SHIMS / "sitecustomize.py"))


@pytest.fixture(scope="session", autouse=True)
def prepared():
    """Engines, and ranks of parts of one, find the planner compiled and SGLang imported."""
    eplb_plugin.warmup(dispatch="balanced")
    preload("tests.engines.sglang.drive", "tests.engines.sglang.dispatch_ranks")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The tiny model, saved, and what transformers decodes with it."""
    from tests.engines.sglang.tiny_model import make_model

    return make_model(tmp_path_factory.mktemp("model"))
