"""Seeded synthetic traffic with the load statistics of real models: loads of steps and batches of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from ..core.errors import TraceError
from .traces import MAX_CELLS, LoadTrace

__all__ = ["Floats", "PROFILES", "TokenStream", "TrafficProfile", "generate", "profile", "topic_mix"]

Floats = np.ndarray[Any, np.dtype[np.float64]]

TOPIC_CORRELATION = 0.1
"""Correlation over experts between the loads of two topics, as measured on real traffic."""

_TRIAL_LAYERS = 64
_WAVES = 3
_MAX_SHARES = 2**26


@dataclass(frozen=True, kw_only=True)
class TrafficProfile:
    """The shape of a model and the unevenness of its expert loads.

    Attributes:
        name: name on the command line.
        layers: MoE layers.
        experts: logical experts per layer.
        top_k: experts per token.
        log_std: median over layers of the standard deviation over experts of log(load / mean load).
        num_groups: groups of logical experts; 1 without group-limited routing.
    """

    name: str
    layers: int
    experts: int
    top_k: int
    log_std: float
    num_groups: int = 1


_PROFILES = (
    TrafficProfile(name="kimi-k2.5", layers=60, experts=384, top_k=8, log_std=0.48),
    TrafficProfile(name="deepseek-v3", layers=58, experts=256, top_k=8, log_std=0.65, num_groups=8),
    TrafficProfile(name="glm-5.2", layers=75, experts=256, top_k=8, log_std=0.81),
    TrafficProfile(name="deepseek-v2-lite", layers=26, experts=64, top_k=6, log_std=0.81),
    TrafficProfile(name="gpt-oss-20b", layers=24, experts=32, top_k=4, log_std=1.21),
    TrafficProfile(name="llama-4-maverick", layers=24, experts=128, top_k=1, log_std=1.62),
    TrafficProfile(name="qwen3-235b", layers=94, experts=128, top_k=8, log_std=2.59),
)
PROFILES: Mapping[str, TrafficProfile] = MappingProxyType({item.name: item for item in _PROFILES})
"""The known models, by name."""


def profile(name: str) -> TrafficProfile:
    """The profile `name`.

    Raises:
        TraceError: unknown name; the message lists the known ones.
    """
    if name not in PROFILES:
        raise TraceError(f"no traffic profile {name!r}; there are {', '.join(PROFILES)}")
    return PROFILES[name]


def generate(
    source: str | TrafficProfile,
    *,
    layers: int | None = None,
    experts: int | None = None,
    steps: int = 1024,
    tokens_per_step: int = 2048,
    topics: int = 4,
    drift: float = 1.5,
    period: float = 4096,
    jitter: float = 0.15,
    seed: int = 0,
) -> LoadTrace:
    """Draw the load of a run.

    Each topic has its own shares of the experts of each layer, drawn from a gamma distribution. They are
    independent between layers and slightly correlated between topics. Gamma has the long tail towards cold
    experts of real loads; a lognormal has far too hot experts. The mix of topics drifts, the shares fluctuate
    with the requests in flight, and each step is a multinomial draw.

    Args:
        source: a profile or its name; `layers` and `experts` go over those of the profile.
        tokens_per_step: tokens of each step; each counts `top_k` times in every layer.
        topics: number of topics, or kinds of requests.
        drift: drift of the mix of topics, as in `topic_mix`.
        period: typical number of steps between two highs of a topic.
        jitter: standard deviation of the fluctuation of log shares, with a time constant of 64 steps.
        seed: the same arguments and seed give the same load on every machine.

    Returns:
        load int32 [steps, layers, experts]; each layer of each step sums to `tokens_per_step * top_k`.

    Raises:
        TraceError: an unknown profile, or a number outside its range.
    """
    base = profile(source) if isinstance(source, str) else source
    layers = base.layers if layers is None else layers
    experts = base.experts if experts is None else experts
    for name, value, low in (
        ("layers", layers, 1),
        ("experts", experts, base.top_k),
        ("steps", steps, 1),
        ("tokens_per_step", tokens_per_step, 1),
        ("topics", topics, 1),
        ("drift", drift, 0),
        ("period", period, 1),
        ("jitter", jitter, 0),
    ):
        if value < low:
            raise TraceError(f"{base.name}: {name}={value} is below {low}")
    if steps * layers * experts > MAX_CELLS:
        raise TraceError(
            f"{base.name}: steps={steps}, layers={layers}, experts={experts} take too much memory"
        )
    rng = np.random.default_rng(seed)
    mix = topic_mix(steps, topics, drift=drift, period=period, rng=rng)
    shares = _topic_shares(base.log_std, mix.mean(0), layers, experts, rng)
    # A token chooses an expert at most once; the margin of 10% is for the noise of the draw.
    bound = max(0.9 / base.top_k, 1 / experts)
    # The requests of a decode batch are replaced within about 64 steps.
    keep = np.exp(-1 / 64)
    wander = jitter * rng.standard_normal((layers, experts))
    load = np.empty((steps, layers, experts), np.int32)
    for step in range(steps):
        mean = np.tensordot(mix[step], shares, 1) * np.exp(wander)
        load[step] = rng.multinomial(tokens_per_step * base.top_k, _at_most(mean, bound))
        wander = keep * wander + np.sqrt(1 - keep**2) * jitter * rng.standard_normal((layers, experts))
    return LoadTrace(torch.from_numpy(load), f"{base.name} (generated)")


def _topic_shares(
    log_std: float, weight: Floats, layers: int, experts: int, rng: np.random.Generator
) -> Floats:
    """Shares float64 [topics, layers, experts] whose mean, weighted by `weight` [topics], has `log_std`.

    A mix of topics is more even than each topic. A bisection on trial draws finds the shape of the gammas.
    """
    low, high = 1e-3, 1e3
    for _ in range(20):
        shape = float(np.sqrt(low * high))
        trial = np.tensordot(weight, _draw_shares(shape, len(weight), _TRIAL_LAYERS, experts, rng), 1)
        # A single expert has no spread: any shape is right.
        too_uneven = np.median(np.log(trial).std(1)) > log_std
        low, high = (shape, high) if too_uneven else (low, shape)
    return _draw_shares(high, len(weight), layers, experts, rng)


def _draw_shares(shape: float, topics: int, layers: int, experts: int, rng: np.random.Generator) -> Floats:
    """Shares float64 [topics, layers, experts] from gammas of `shape`, correlated between topics.

    The sum of gammas of shapes rho*k (common) and (1-rho)*k (own) is a gamma of shape k. Two such sums with
    the same common part have the correlation rho.
    """
    common = rng.gamma(TOPIC_CORRELATION * shape, size=(1, layers, experts))
    own = rng.gamma((1 - TOPIC_CORRELATION) * shape, size=(topics, layers, experts))
    # The floor gives every expert a share above 0, whose logarithm is finite.
    weight = common + own + 1e-6 * shape
    shares: Floats = weight / weight.sum(2, keepdims=True)
    return shares


def _at_most(weight: Floats, bound: float) -> Floats:
    """Normalise `weight` over its last axis; excess above `bound` goes to the other entries, if possible."""
    share: Floats = weight / weight.sum(-1, keepdims=True)
    for _ in range(8):
        over = share > bound
        if not over.any():
            break
        free = np.where(over, 0, share)
        room = 1 - bound * over.sum(-1, keepdims=True)
        share = np.where(over, bound, free * (room / np.maximum(free.sum(-1, keepdims=True), 1e-300)))
    share /= share.sum(-1, keepdims=True)
    return share


class TokenStream:
    """Batches of token ids for the demo, in which token `t` belongs to topic `t % topics`.

    Batches are independent: any process can draw any batch.

    Args:
        vocabulary: number of token ids.
        mix: float64 [steps, topics], share of each topic at each step.
        seed: the same arguments and seed give the same batches on every machine.

    Raises:
        TraceError: more topics than token ids, or `mix` is not [steps, topics].
    """

    def __init__(self, vocabulary: int, topics: int, mix: Floats, seed: int = 0) -> None:
        if not 1 <= topics <= vocabulary:
            raise TraceError(f"topics={topics} is outside 1..{vocabulary} (the token ids)")
        if mix.ndim != 2 or mix.shape[1] != topics:
            raise TraceError(f"the mix has shape {mix.shape}, not [steps, {topics}]")
        self._vocabulary, self._topics, self._seed = vocabulary, topics, seed
        self._cumulative = np.cumsum(mix, 1)[:, :-1]

    def batch(self, step: int, rank: int, tokens: int) -> torch.Tensor:
        """The batch of `rank` at `step`: int64 [tokens], token ids."""
        rng = np.random.default_rng([self._seed, step, rank])
        topic = np.searchsorted(self._cumulative[step], rng.random(tokens), side="right")
        of_topic = (self._vocabulary - topic - 1) // self._topics + 1
        pick = (rng.random(tokens) * of_topic).astype(np.int64)
        return torch.from_numpy(topic + pick * self._topics)


def topic_mix(steps: int, topics: int, *, drift: float, period: float, rng: np.random.Generator) -> Floats:
    """Draw the share of each topic at each step.

    The log share of a topic is a sum of three waves with random phases and random lengths around `period`.
    The mix never jumps and never repeats, and topics drift independently.

    Args:
        drift: standard deviation over time of a log share before normalisation. 0: equal shares; 1: clear
            drift; 3: one topic dominates at a time.
        period: typical number of steps between two highs of a topic.

    Returns:
        float64 [steps, topics]; every row sums to 1.

    Raises:
        TraceError: steps * topics is above 2**26.
    """
    if steps * topics > _MAX_SHARES:
        raise TraceError(f"steps={steps} with topics={topics} take too much memory")
    phase = rng.uniform(0, 2 * np.pi, (_WAVES, 1, topics))
    length = period * rng.uniform(0.6, 1.6, (_WAVES, 1, topics))
    angle = 2 * np.pi * np.arange(steps)[:, None] / length + phase
    # A sine has variance 1/2: the factor gives the sum of waves the standard deviation `drift`.
    logits = drift * np.sqrt(2 / _WAVES) * np.sin(angle).sum(0)
    shares = np.exp(logits - logits.max(1, keepdims=True))
    mix: Floats = shares / shares.sum(1, keepdims=True)
    return mix
