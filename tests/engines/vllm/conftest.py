"""One tiny model and the tokens that one rank without EPLB makes of it, for all tests of this folder."""

import importlib.util
import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

import eplb_plugin
from tests.engines.compiled import choose_cache
from tests.engines.forked import preload, run_forked

from .processes import environment, free_port, tail

# The suite of the package itself runs where no engine is installed; `make test-vllm` runs these.
collect_ignore_glob = [] if importlib.util.find_spec("vllm") else ["test_*.py"]

if not collect_ignore_glob:
    choose_cache()
    # Each rank computes on one core; vLLM can tell that only to processes that it starts, not to forked ones.
    os.environ["OMP_NUM_THREADS"] = "1"

LIMIT = 420  # seconds of one engine, start included; many times what it takes


def llm_arguments(model, ranks=1, **more):
    return {
        "model": str(model),
        "skip_tokenizer_init": True,
        # Sums in bfloat16 depend on their order, which replicas change.
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 128,
        "max_num_seqs": 32,
        "seed": 0,
        "enable_prefix_caching": False,
        "tensor_parallel_size": ranks,
        "worker_extension_cls": "tests.engines.vllm.worker_checks.WorkerChecks",
        **more,
    }


def eplb_arguments(*, use_async, **more):
    """Rearrangements every few steps."""
    return {
        "enable_expert_parallel": True,
        "enable_eplb": True,
        "eplb_config": {
            "window_size": 4,
            "step_interval": 8,
            "num_redundant_experts": 4,
            "use_async": use_async,
            "communicator": "torch_gloo",
        },
        **more,
    }


# Moves are free, so that steady traffic does not end the rearrangements that the tests are about.
RESTLESS = {"enabled": True, "history": 1, "planner": {"move_price": 0.0, "min_gain": 0.0}}
BALANCED = RESTLESS | {"dispatch": "balanced"}


def drive_together(folder, scenarios):
    """What `drive.py` makes of a scenario for each data-parallel rank, all at the same time."""
    count = len(scenarios)
    port = str(free_port())
    shared = {"VLLM_DP_SIZE": str(count), "VLLM_DP_MASTER_IP": "127.0.0.1", "VLLM_DP_MASTER_PORT": port}

    def run(rank):
        env = shared | {"VLLM_DP_RANK": str(rank), "VLLM_DP_RANK_LOCAL": str(rank)}
        return drive(folder, scenarios[rank] | {"peers": count}, count, name=f"-{rank}", **env)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def drive(folder, scenario, ranks, *, name="", **env):
    """What `drive.py` makes of a scenario, and the engine's log."""
    log, result = folder / f"engine{name}.log", folder / f"result{name}.json"
    env = environment(ranks, folder, **env)
    status = run_forked(_drive, scenario, result, log=log, env=env, limit=LIMIT)
    assert status is not None, f"still running after {LIMIT} s\n{tail(log)}"
    assert status == 0, tail(log)
    return json.loads(result.read_text()) | {"log": log.read_text(errors="replace")}


def _drive(scenario, result):
    from . import drive

    drive.main(scenario, result)


@pytest.fixture(scope="session", autouse=True)
def prepared():
    """Engines find the planner compiled and vLLM imported."""
    eplb_plugin.warmup(dispatch="balanced")
    preload("tests.engines.vllm.drive")


@pytest.fixture
def registered(monkeypatch):
    """The plugins of this environment, as vLLM loads them, on a class that is as before afterwards."""
    from importlib.metadata import entry_points

    from vllm.distributed.eplb.eplb_state import EplbState
    from vllm.v1.worker.worker_base import WorkerBase
    from vllm_eplb_on_cpu.device import with_cpu_streams

    from eplb_plugin.integration.vllm import plugin as vllm_plugin

    with_cpu_streams()
    monkeypatch.setattr(EplbState, "__init__", EplbState.__init__)
    monkeypatch.setattr(WorkerBase, "__init__", WorkerBase.__init__)
    monkeypatch.setattr(vllm_plugin, "_active", [])
    # The lines go to the root logger, where caplog reads them, not to vLLM's.
    monkeypatch.setattr(vllm_plugin, "_share_log", lambda: None)
    monkeypatch.delenv("EPLB_PLUGIN_CONFIG", raising=False)
    (ours,) = (one for one in entry_points(group="vllm.general_plugins") if one.name == "eplb_plugin")
    ours.load()()


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    from vllm_eplb_on_cpu.model import save_tiny_model

    folder = tmp_path_factory.mktemp("model")
    save_tiny_model(folder)
    return folder


@pytest.fixture(scope="session")
def expected(model, tmp_path_factory):
    """The greedy tokens of each prompt from one rank without EPLB."""
    scenario = {"llm": llm_arguments(model), "steps": [{"name": "alone", "rounds": 2}]}
    result = drive(tmp_path_factory.mktemp("alone"), scenario, 1)
    first, second = result["steps"]["alone"]["rounds"]
    assert first == second
    assert len({tuple(tokens) for tokens in first}) == len(first), "the prompts' tokens do not differ"
    return first
