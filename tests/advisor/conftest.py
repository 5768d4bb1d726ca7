"""Loads that the tests of the advisor share."""

from __future__ import annotations

import pytest
import torch

from eplb_plugin.offline.synthetic_traffic import generate
from eplb_plugin.offline.traces import LoadTrace


@pytest.fixture(scope="module")
def steady():
    return generate("gpt-oss-20b", layers=2, steps=64, tokens_per_step=512, drift=0, jitter=0.05)


@pytest.fixture(scope="module")
def changing():
    one, other = (
        generate("gpt-oss-20b", layers=2, steps=32, tokens_per_step=512, drift=0, seed=seed).load
        for seed in (1, 2)
    )
    return LoadTrace(torch.cat([one, other]), "changing")
