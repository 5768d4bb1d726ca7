"""What SGLang's own recorder dumps, in each of its modes, is read as the load that there was."""

from __future__ import annotations

import pytest
import torch

from eplb_plugin.formats.loads import read_trace
from tests.engines.sglang.engine_process import SMALL_ENGINE, run
from tests.engines.sglang.tiny_model import EXPERTS, LAYERS

TOP_K = 4
RANKS = 2
NEW_TOKENS = 10


def record(tiny, folder, mode):
    """Record three prompts and read the dumps."""
    dumps = folder / mode
    dumps.mkdir()
    arguments = {
        "model_path": str(tiny.path),
        **SMALL_ENGINE,
        "tp_size": RANKS,
        "ep_size": RANKS,
        "chunked_prefill_size": 256,
        "ep_num_redundant_experts": 8,
        "expert_distribution_recorder_mode": mode,
        "expert_distribution_recorder_buffer_size": 50,
    }
    env = {"SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR": str(dumps)}
    engine = run(dump, arguments, tiny.prompts[:3], NEW_TOKENS, log=folder / f"{mode}.log", env=env)
    assert "dumped" in engine.text(), engine.tail()
    return read_trace(dumps).load.long()


def dump(*arguments):
    from tests.engines.sglang import drive

    drive.dump_recorded(*arguments)


@pytest.mark.timeout(1300)
def test_every_mode_of_the_recorder_gives_the_same_load(tiny, tmp_path):
    loads = {mode: record(tiny, tmp_path, mode) for mode in ("stat", "per_pass", "per_token")}
    # Without an all-to-all backend every rank counts all tokens: those of the prompts, then one of each.
    prompts = sum(len(prompt) for prompt in tiny.prompts[:3])
    tokens = torch.tensor([prompts, *[3] * (NEW_TOKENS - 1)])
    for mode, load in loads.items():
        assert load.shape == (NEW_TOKENS, LAYERS, EXPERTS), mode
        assert torch.equal(load.sum(2), (tokens * TOP_K * RANKS)[:, None].expand(-1, LAYERS)), mode
        assert torch.equal(load, loads["stat"]), mode
