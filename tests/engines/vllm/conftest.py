"""One tiny model and the tokens that one rank without EPLB makes of it, for all tests of this folder."""

import importlib.util
import json
import subprocess

import pytest

from .processes import engine, environment, tail

# The suite of the package itself runs where no engine is installed; `make test-vllm` runs these.
collect_ignore_glob = [] if importlib.util.find_spec("vllm") else ["test_*.py"]

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


def drive(folder, scenario, ranks, **env):
    """What `drive.py` makes of a scenario, and the engine's log."""
    (folder / "scenario.json").write_text(json.dumps(scenario))
    log, result = folder / "engine.log", folder / "result.json"
    command = ["-m", "tests.engines.vllm.drive", str(folder / "scenario.json"), str(result)]
    with engine(command, log, environment(ranks, folder, **env)) as process:
        try:
            code = process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {LIMIT} s\n{tail(log)}")
    assert code == 0, tail(log)
    return json.loads(result.read_text()) | {"log": log.read_text(errors="replace")}


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
