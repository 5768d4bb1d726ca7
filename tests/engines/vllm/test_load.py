"""Real engines that vLLM ends at load or at the first step: the plugin's line is in the log, and says why."""

import pytest

from tests.engines.forked import run_forked

from .conftest import LIMIT, RESTLESS, _drive, eplb_arguments, llm_arguments
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
