"""Real engines in which loading goes wrong, with or without an end: the plugin's line is in the log."""

import pytest

from tests.engines.forked import run_forked
from tests.series import samples

from .conftest import LIMIT, RESTLESS, _drive, drive, eplb_arguments, llm_arguments
from .processes import environment, tail

pytestmark = pytest.mark.timeout(LIMIT)


def log_of_a_failed_start(folder, model, **eplb_config):
    """The log of an engine on two ranks with the plugin enabled, which has to end by itself."""
    arguments = llm_arguments(model, 2, **eplb_arguments(use_async=False))
    arguments["eplb_config"] |= eplb_config
    arguments["additional_config"] = {"eplb_plugin": RESTLESS}
    scenario = {"llm": arguments, "steps": [{"name": "first", "rounds": 1}]}
    log = folder / "engine.log"
    env = environment(2, folder)
    status = run_forked(_drive, scenario, folder / "result.json", log=log, env=env, limit=LIMIT)
    assert status is not None, tail(log)
    assert status != 0, tail(log)
    return log.read_text(errors="replace")


def test_numbers_that_do_not_divide_end_the_start_with_those_that_do(model, tmp_path):
    log = log_of_a_failed_start(tmp_path, model, num_redundant_experts=3)
    assert (
        "num_redundant_experts=3: 16 experts and 3 redundant ones are 19 slots, not divisible by 2 ranks; "
        "num_redundant_experts=2 or 4 would be (vLLM: EPLB currently only supports even distribution"
    ) in log


def test_a_model_without_eplb_support_is_named_before_vllm_ends(tmp_path):
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    config = Qwen2MoeConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=128,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=16,
        num_experts_per_tok=4,
        max_position_embeddings=512,
        dtype="float32",
    )
    Qwen2MoeForCausalLM(config).save_pretrained(tmp_path / "model")
    log = log_of_a_failed_start(tmp_path, tmp_path / "model", num_redundant_experts=0)
    told = "(Qwen2MoeForCausalLM) is no MixtureOfExperts in vLLM"
    assert log.count(told) == 1, tail(tmp_path / "engine.log")
    assert "assert self._moe_model is not None" in log[log.index(told) :]


def test_weights_that_would_go_wrong_are_named_at_load(model, tmp_path):
    """FINDINGS of public reports in one engine: each is one line, before the first plan, and counted."""
    arguments = llm_arguments(model, 2, **eplb_arguments(use_async=False))
    # The engine is wrong from the start, so nothing moves, and nobody asks it for tokens.
    arguments["eplb_config"] |= {"step_interval": 2**20}
    arguments["additional_config"] = {"eplb_plugin": RESTLESS | {"metrics": True}}
    steps = [{"name": "loaded", "before": [["show_metrics"]], "rounds": 0, "report": True}]
    result = drive(tmp_path, {"llm": arguments, "put_in": 16, "steps": steps}, 2)
    lines = [line.partition(f"{model}: ")[2] for line in result["log"].splitlines() if " WARNING " in line]
    unmoved, differing = (line for line in lines if " experts" in line)
    assert unmoved == (
        "tensors with a row for each slot do not move with the experts; if they belong to experts, answers "
        "are wrong after a rebalance: layers 0-3: w2_weight (10, 128, 64) float32, "
        "quant_method.moe_quant_config._w1.alpha_or_gscale (10,) float32"
    )
    # Experts 0 to 3 have their second replica in a redundant slot, in each of four layers.
    assert differing.startswith("16 of 64 experts have replicas with different weights")
    assert differing.endswith(" the first (layer, expert): (0, 0), (0, 1), (0, 2), (0, 3), (1, 0)")
    counted = {"unmoved_tensors": 1, "differing_replicas": 1}
    for rank in result["steps"]["loaded"]["report"]:
        (planned,) = rank["models"].values()
        assert planned["warnings"] == counted
    first, other = map(samples, result["show_metrics"])
    shown = {name: value for name, value in first.items() if name.startswith("eplb_warnings_total") and value}
    assert shown == {f"eplb_warnings_total{{{cause},{model}}}": 1 for cause in counted}
    assert not any(name.startswith("eplb_") for name in other)
