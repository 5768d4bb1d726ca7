"""The generator's loads have the statistics of real ones, and are the same everywhere."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from eplb_plugin.core.errors import TraceError
from eplb_plugin.offline.synthetic_traffic import (
    PROFILES,
    TokenStream,
    TrafficProfile,
    generate,
    profile,
    topic_mix,
)


def correlation(a, b):
    """Median over layers of the correlation of two loads, both [layers, experts]."""
    return float(np.median([np.corrcoef(x, y)[0, 1] for x, y in zip(a, b, strict=True)]))


@pytest.mark.parametrize("name", PROFILES)
def test_profiles_have_their_unevenness(name):
    want = PROFILES[name]
    trace = generate(name, layers=16, steps=128, period=64)
    load = trace.load.double().sum(0)
    log_std = (load.clamp(min=0.5) / load.mean(1, keepdim=True)).log().std(1, correction=0).median()
    assert float(log_std) == pytest.approx(want.log_std, rel=0.12)
    hottest = load.amax(1) / load.mean(1)
    assert 2 < float(hottest.median()) < 16
    assert trace.num_experts == want.experts


@pytest.mark.parametrize("name", ["deepseek-v3", "gpt-oss-20b", "llama-4-maverick"])
def test_windows_of_one_kind_resemble_each_other(name):
    windows = generate(name, layers=12, steps=256, topics=1).load.double().reshape(4, 64, 12, -1).sum(1)
    for before, after in itertools.pairwise(windows):
        assert 0.8 < correlation(before, after) < 0.999


@pytest.mark.parametrize("name", ["kimi-k2.5", "glm-5.2", "qwen3-235b"])
def test_topics_hardly_resemble_each_other(name):
    # So strong a drift leaves one topic at a time; find a step that each of two topics owns.
    options = {"layers": 24, "steps": 400, "topics": 2, "drift": 10, "period": 100, "seed": 3}
    trace = generate(name, **options)
    mix = topic_mix(400, 2, drift=10, period=100, rng=np.random.default_rng(3))
    assert mix.max(0).min() > 0.99
    loads = [trace.load[int(step)].double() for step in mix.argmax(0)]
    assert -0.1 < correlation(*loads) < 0.3


def test_layers_are_independent():
    load = generate("deepseek-v3", layers=24, steps=32).load.double().sum(0).numpy()
    neighbours = [np.corrcoef(a, b)[0, 1] for a, b in itertools.pairwise(load)]
    assert abs(np.mean(neighbours)) < 0.05


def test_traffic_that_drifts_changes_the_load():
    steady, drifting = (
        generate("glm-5.2", layers=8, steps=256, period=256, drift=drift).load.double() for drift in (0, 2)
    )
    assert correlation(steady[:32].sum(0), steady[-128:-96].sum(0)) > 0.9
    assert correlation(drifting[:32].sum(0), drifting[-128:-96].sum(0)) < 0.85


def test_every_token_is_counted():
    trace = generate("deepseek-v2-lite", layers=3, steps=10, tokens_per_step=100)
    assert trace.load.shape == (10, 3, 64)
    assert trace.load.dtype == torch.int32
    assert (trace.load.sum(2) == 100 * 6).all()
    # A token chooses an expert at most once, so none gets more tokens than there are.
    assert int(generate("gpt-oss-20b", steps=64).load.max()) <= 2048


def test_the_noise_is_that_of_counting():
    trace = generate("deepseek-v3", layers=4, steps=400, topics=1, jitter=0, tokens_per_step=500)
    mean = trace.load.double().mean(0)
    spread = trace.load.double().var(0) / (mean * (1 - mean / mean.sum(1, keepdim=True)))
    assert float(spread.mean()) == pytest.approx(1, abs=0.03)


def test_the_seed_decides_all_and_nothing_global_is_touched():
    before = (torch.random.get_rng_state(), np.random.get_state()[1].copy())
    one, same, other = (generate("gpt-oss-20b", layers=2, steps=8, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.load, same.load)
    assert not torch.equal(one.load, other.load)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()


def test_profiles_of_ones_own():
    own = TrafficProfile(name="own", layers=2, experts=8, top_k=2, log_std=1.0)
    assert generate(own, steps=4).load.shape == (4, 2, 8)
    # As many experts chosen as there are: every one gets every token, apart from noise.
    every = TrafficProfile(name="every", layers=1, experts=4, top_k=4, log_std=1.0)
    assert generate(every, steps=4, jitter=0).load.float().std() < 100
    single = TrafficProfile(name="single", layers=1, experts=1, top_k=1, log_std=1.0)
    assert (generate(single, steps=4).load == 2048).all()


def test_wrong_numbers_are_named():
    with pytest.raises(TraceError, match="no traffic profile 'gpt-5'; there are kimi"):
        profile("gpt-5")
    for name, value in [("steps", 0), ("topics", 0), ("layers", 0), ("experts", 3), ("jitter", -1)]:
        with pytest.raises(TraceError, match=f"{name}={value} is below"):
            generate("gpt-oss-20b", **{name: value})


def test_a_mix_is_one_and_moves_smoothly():
    mix = topic_mix(1000, 5, drift=1, period=200, rng=np.random.default_rng(0))
    np.testing.assert_allclose(mix.sum(1), 1)
    assert (mix > 0).all()
    assert np.abs(np.diff(mix, axis=0)).max() < 0.05
    assert mix.std(0).min() > 0.03
    np.testing.assert_allclose(topic_mix(3, 5, drift=0, period=9, rng=np.random.default_rng(0)), 0.2)


def test_the_token_stream_follows_its_mix():
    mix = np.array([[1.0, 0, 0], [0, 0, 1], [0.5, 0.25, 0.25]])
    stream = TokenStream(100, 3, mix, seed=4)
    assert (stream.batch(0, 0, 50) % 3 == 0).all()
    assert (stream.batch(1, 0, 50) % 3 == 2).all()
    last = stream.batch(2, 0, 20_000)
    assert torch.bincount(last % 3).div(20_000).tolist() == pytest.approx([0.5, 0.25, 0.25], abs=0.02)
    assert set(last.tolist()) == set(range(100))


def test_batches_differ_by_step_and_rank_and_need_no_order():
    mix = np.full((5, 2), 0.5)
    a, b = TokenStream(64, 2, mix), TokenStream(64, 2, mix)
    expected = {(step, rank): a.batch(step, rank, 32) for step in range(5) for rank in range(2)}
    assert torch.equal(b.batch(3, 1, 32), expected[3, 1])
    assert len({tuple(batch.tolist()) for batch in expected.values()}) == 10


def test_streams_that_cannot_be():
    with pytest.raises(TraceError, match=r"topics=4 is outside 1..3"):
        TokenStream(3, 4, np.ones((1, 4)))
    with pytest.raises(TraceError, match=r"not \[steps, 2\]"):
        TokenStream(3, 2, np.ones((1, 3)))
