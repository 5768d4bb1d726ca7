"""vLLM's EPLB state with the plugin, without an engine."""

from types import SimpleNamespace

import pytest
import torch
from vllm.config import set_current_vllm_config
from vllm.distributed.eplb.eplb_state import EplbState


def state_with(additional_config):
    """vLLM's state, made while vLLM has this configuration."""
    config = SimpleNamespace(additional_config=additional_config)
    try:
        with set_current_vllm_config(config):
            return EplbState(SimpleNamespace(), torch.device("cpu"))
    except AttributeError:
        pytest.fail("vLLM looked for more than additional_config")
