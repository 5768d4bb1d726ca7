"""Replay of a token trace as decode or prefill: from the experts of each token to the load of each step."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..core.errors import TraceError, checked_integer
from .synthetic_traffic import Floats, topic_mix
from .traces import MAX_CELLS, LoadTrace, TokenTrace

__all__ = ["category_mix", "decode_schedule", "fold_decode", "fold_prefill"]

_Ints = np.ndarray[Any, np.dtype[np.int64]]
_CHUNK_IDS = 4_000_000  # expert choices counted at once: a bound on scratch memory


def fold_decode(
    trace: TokenTrace,
    batch: int,
    *,
    steps: int | None = None,
    drift: float = 1.5,
    period: float = 4096,
    seed: int = 0,
) -> LoadTrace:
    """Replay a trace as decode: each step takes the next token of every request in flight.

    Args:
        batch: requests in flight.
        steps: steps to replay; by default tokens / batch, at least one.
        drift: drift of the mix of categories, as in `topic_mix`.
        period: typical number of steps between two highs of a category.
        seed: seed of the mix and of the draws.

    Returns:
        load int32 [steps, layers, experts], tokens; each layer of each step sums to `batch * top_k`.

    Raises:
        TraceError: `batch` or `steps` is below 1.
    """
    if steps is None:
        steps = max(1, trace.num_tokens // max(batch, 1))
    tokens = decode_schedule(trace, batch, steps, drift=drift, period=period, seed=seed)
    bounds = np.arange(steps + 1) * batch
    return LoadTrace(_count(trace, tokens.reshape(-1), bounds), f"{trace.name} (decode, batch {batch})")


def decode_schedule(
    trace: TokenTrace, batch: int, steps: int, *, drift: float, period: float, seed: int
) -> _Ints:
    """Schedule the tokens of decode: for each step, the token of each request in flight.

    When a request ends, a new one takes its place at the next step. Its category is drawn from the mix of
    that step, and the request uniformly from the category. The first requests start at a random token, as in
    a service that has run for long.

    Returns:
        int64 [steps, batch], token indices of the trace.

    Raises:
        TraceError: `batch` or `steps` is below 1, or both are too large.
    """
    checked_integer(f"{trace.name}: batch", batch, TraceError)
    checked_integer(f"{trace.name}: steps", steps, TraceError)
    if steps * batch > MAX_CELLS:
        raise TraceError(f"{trace.name}: steps={steps} of batch={batch} take too much memory")
    rng = np.random.default_rng(seed)
    usable = np.flatnonzero(trace.lengths > 0)
    _, category, size = np.unique(trace.category[usable], return_inverse=True, return_counts=True)
    mix = topic_mix(steps, len(size), drift=drift, period=period, rng=rng)
    # Sorted by category, the requests of a category are contiguous, and a draw is two lookups.
    by_category = usable[np.argsort(category, kind="stable")]
    offset = np.cumsum(size) - size
    first, lengths = trace.first, trace.lengths

    def draw(step: int, count: int) -> _Ints:
        kind = np.searchsorted(np.cumsum(mix[step])[:-1], rng.random(count), side="right")
        drawn: _Ints = by_category[offset[kind] + (rng.random(count) * size[kind]).astype(np.int64)]
        return drawn

    request = draw(0, batch)
    token = first[request] + (rng.random(batch) * lengths[request]).astype(np.int64)
    end = first[request] + lengths[request]
    schedule = np.empty((steps, batch), np.int64)
    for step in range(steps):
        ended = np.flatnonzero(token == end)
        if ended.size:
            request = draw(step, ended.size)
            token[ended] = first[request]
            end[ended] = first[request] + lengths[request]
        schedule[step] = token
        token += 1
    return schedule


def fold_prefill(trace: TokenTrace, max_tokens: int) -> LoadTrace:
    """Replay a trace as prefill, in file order: a step takes whole requests up to `max_tokens` tokens.

    A request of more than `max_tokens` tokens is a step of its own.

    Returns:
        load int32 [steps, layers, experts], tokens; the last step may be small.

    Raises:
        TraceError: `max_tokens` is below 1.
    """
    checked_integer(f"{trace.name}: max_tokens", max_tokens, TraceError)
    ends = np.unique(trace.first[1:])
    ends = ends[ends > 0]
    bounds = [0]
    while bounds[-1] < trace.num_tokens:
        fits = int(np.searchsorted(ends, bounds[-1] + max_tokens, side="right")) - 1
        following = int(np.searchsorted(ends, bounds[-1], side="right"))
        bounds.append(int(ends[max(fits, following)]))
    tokens = np.arange(trace.num_tokens)
    return LoadTrace(_count(trace, tokens, np.array(bounds)), f"{trace.name} (prefill, {max_tokens} tokens)")


def category_mix(trace: TokenTrace, tokens: _Ints | None = None, *, steps: int | None = None) -> Floats:
    """The share of each category at each step.

    Args:
        tokens: int64 [steps, batch], a schedule of `decode_schedule`; None is the order of the file.
        steps: for the order of the file: number of equal parts, one by default.

    Returns:
        float64 [steps, categories], categories in sorted order; every row sums to 1.

    Raises:
        TraceError: fewer tokens than steps.
    """
    names, category = np.unique(trace.category, return_inverse=True)
    if tokens is None:
        steps = steps or 1
        if trace.num_tokens < steps:
            raise TraceError(f"{trace.name} has {trace.num_tokens} tokens, fewer than steps={steps}")
        # Parts differ by one token at most; a shorter part counts one token twice, a negligible error.
        width = -(-trace.num_tokens // steps)
        start = np.arange(steps) * trace.num_tokens // steps
        tokens = np.minimum(start[:, None] + np.arange(width), trace.num_tokens - 1)
    kind = category[trace.request[tokens]] + np.arange(len(tokens))[:, None] * len(names)
    count = np.bincount(kind.reshape(-1), minlength=len(tokens) * len(names)).reshape(len(tokens), -1)
    mix: Floats = count / count.sum(1, keepdims=True)
    return mix


def _count(trace: TokenTrace, tokens: _Ints, bounds: _Ints) -> torch.Tensor:
    """Load of the steps `tokens[bounds[s]:bounds[s+1]]`: int32 [steps, layers, experts]."""
    steps, cells = len(bounds) - 1, trace.num_layers * trace.num_experts
    if steps * cells > MAX_CELLS:
        wanted = f"{steps} steps of {trace.num_layers} layers with {trace.num_experts} experts"
        raise TraceError(f"{trace.name}: {wanted} take too much memory")
    load = np.zeros((steps, cells), np.int32)
    # Index of (layer, expert) within a step; int32 keeps the gather within the cache.
    layer_base = (np.arange(trace.num_layers, dtype=np.int32) * trace.num_experts)[None, :, None]
    ids_per_token = trace.num_layers * trace.top_k
    start = 0
    while start < steps:
        limit = bounds[start] + max(1, _CHUNK_IDS // ids_per_token)
        stop = max(start + 1, int(np.searchsorted(bounds, limit, side="right")) - 1)
        part = slice(int(bounds[start]), int(bounds[stop]))
        step = np.repeat(np.arange(stop - start), np.diff(bounds[start : stop + 1]))
        cell = trace.topk_ids[tokens[part]] + (layer_base + (step * cells)[:, None, None])
        load[start:stop] = np.bincount(cell.reshape(-1), minlength=(stop - start) * cells).reshape(-1, cells)
        start = stop
    return torch.from_numpy(load.reshape(steps, trace.num_layers, trace.num_experts))
