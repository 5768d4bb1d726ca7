"""A mix of topics that changes smoothly over time, as the traffic of a service does over a day."""

from __future__ import annotations

from typing import Any

import numpy as np

from .errors import TraceError

__all__ = ["topic_mix"]

_WAVES = 3
_MAX_SHARES = 2**26


def topic_mix(
    steps: int, topics: int, *, drift: float, period: float, rng: np.random.Generator
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The share of each topic at each step.

    The log of each share is a sum of three waves with random phases and lengths around `period`, so the
    mix never jumps, never repeats exactly, and any two topics go their own ways.

    Args:
        steps: number of steps.
        topics: number of topics.
        drift: standard deviation over time of the logs before they are normalised; 0 keeps all topics
            equal, 1 is a clear drift, 3 lets one topic dominate at a time.
        period: typical steps from one high of a topic to the next.
        rng: source of phases and lengths.

    Returns:
        float64 [steps, topics], every row sums to 1.

    Raises:
        TraceError: there are too many of both.
    """
    if steps * topics > _MAX_SHARES:
        raise TraceError(f"steps={steps} with topics={topics} take too much memory")
    phase = rng.uniform(0, 2 * np.pi, (_WAVES, 1, topics))
    length = period * rng.uniform(0.6, 1.6, (_WAVES, 1, topics))
    angle = 2 * np.pi * np.arange(steps)[:, None] / length + phase
    # A sine has variance 1/2, so the sum of the waves gets standard deviation `drift`.
    logits = drift * np.sqrt(2 / _WAVES) * np.sin(angle).sum(0)
    shares = np.exp(logits - logits.max(1, keepdims=True))
    mix: np.ndarray[Any, np.dtype[np.float64]] = shares / shares.sum(1, keepdims=True)
    return mix
