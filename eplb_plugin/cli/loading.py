"""The load of a command, and the interval and topology for it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..advisor.advice import busy_layers
from ..config.options import PlannerOptions, SimulateOptions
from ..config.sources import COMMAND_LINE, Settings
from ..core.errors import ConfigError, TraceError
from ..core.topology import Topology
from ..formats.loads import LOAD_FORMATS, read_trace
from ..formats.recordings import Recording, is_recording, read_recording
from ..offline.synthetic_traffic import PROFILES, generate
from ..offline.token_replay import fold_decode, fold_prefill
from ..offline.traces import LoadTrace, TokenTrace
from ..planning.move_cost import MoveCost, default_bandwidth, serving_share, with_price

__all__ = ["fit_interval", "load_for", "planner_for", "recording_for", "topology_for"]

_INTERVALS = 8
"""Intervals of generated traffic, and minimum number of intervals with a fitted interval."""

_GENERATED, _RECORDED = "generated traffic", "a recorded load"
_DECODE, _PREFILL = "a token trace in decode mode", "a token trace in prefill mode"
_USED_FOR = {
    "mode": (_DECODE, _PREFILL),
    "batch": (_DECODE,),
    "max_tokens": (_PREFILL,),
    **dict.fromkeys(("steps", "drift", "seed"), (_DECODE, _GENERATED)),
}


def recording_for(source: str, settings: Settings) -> tuple[Recording | None, Settings]:
    """The recording `source`, and the settings with what it says; None for any other load.

    What the file, the environment or the command line say stays. With other ranks than the recorded ones, so
    do nodes and slots.

    Raises:
        TraceError: a recording without a file that can be read.
    """
    if not source or source in PROFILES or not is_recording(source):
        return None, settings
    recording = read_recording(source)
    topology, given = recording.newest.topology, settings.origins
    given_slots = settings.simulate.slots if "simulate.slots" in given else None
    found: dict[str, Any] = {"groups": topology.num_groups}
    if not {"simulate.ranks", "simulate.rank_slots"} & given.keys():
        found |= {"ranks": topology.num_ranks, "nodes": topology.num_nodes}
        found["slots"] = topology.num_slots
        if given_slots is None:
            found["rank_slots"] = topology.rank_slots
    for name, value in found.items():
        if f"simulate.{name}" not in given:
            settings = settings.replaced(f"simulate.{name}", value)
    size, seconds = recording.newest.expert_bytes, recording.step_seconds
    if size and "simulate.expert_mb" not in given:
        settings = settings.replaced("simulate.expert_mb", size / 1e6)
    if seconds and "rebalancer.step_ms" not in given:
        settings = settings.replaced("rebalancer.step_ms", 1000 * seconds)
    if "rebalancer.batch" not in given and recording.newest.copies == topology.num_ranks > 1:
        settings = settings.replaced("rebalancer.batch", "replicated")
    return recording, settings


def load_for(
    source: str, settings: Settings, *, alone: bool = True, recording: Recording | None = None
) -> LoadTrace:
    """Read the load of a file, or generate that of a traffic profile.

    Args:
        source: a path, or a name of `PROFILES`.
        settings: the section `simulate` has the replay of tokens and profiles.
        alone: whether `source` is the only one of the command. Then an unused option on the command line
            is an error.
        recording: `source`, where it was read already.

    Raises:
        TraceError: the file is missing, malformed or without tokens, or the profile is unknown.
        ConfigError: an unused option.
    """
    options = settings.simulate
    steps = options.steps or _INTERVALS * settings.rebalancer.interval
    trace: LoadTrace | TokenTrace | None = None
    if recording is not None:
        trace = recording.trace
    elif source not in PROFILES:
        trace = _read(source)
    kind = _PREFILL if options.mode == "prefill" else _DECODE
    if not isinstance(trace, TokenTrace):
        kind = _GENERATED if trace is None else _RECORDED
    for option, kinds in _USED_FOR.items() if alone else ():
        if option == "seed" and "sampled" in options.dispatches:
            continue
        if settings.origins.get(f"simulate.{option}") == COMMAND_LINE and kind not in kinds:
            flag = f"--{option.replace('_', '-')}"
            raise ConfigError(f"{flag} is of no use for {source}, {kind}; it is for {' or '.join(kinds)}")
    mix: Any = {"steps": steps, "drift": options.drift, "period": options.period, "seed": options.seed}
    if trace is None:
        return generate(source, tokens_per_step=options.tokens_per_step, topics=options.topics, **mix)
    if isinstance(trace, TokenTrace):
        if kind == _PREFILL:
            return fold_prefill(trace, options.max_tokens)
        return fold_decode(trace, options.batch, **mix)
    if not bool(trace.load.any()):
        raise TraceError(f"{trace.name}: holds no load: all {trace.load.numel()} values are 0")
    return trace


def fit_interval(settings: Settings, load: LoadTrace) -> Settings:
    """Shorten the default interval for a short load, so that it has eight; a configured one stays.

    The result counts the steps of the load: of a recording, each is a sum of steps of the engine.

    Raises:
        TraceError: the load has at most one interval.
    """
    interval, origin = settings.rebalancer.interval, settings.origins.get("rebalancer.interval")
    if origin is not None and load.engine_steps != 1:
        interval = max(1, round(interval / load.engine_steps))
    if origin is None:
        interval = max(1, min(interval, load.num_steps // _INTERVALS))
    if load.num_steps <= interval:
        has = f"{load.name} has {load.length}"
        if origin is None:
            raise TraceError(f"{has}: none is left to score after a rebalance")
        asked = settings.rebalancer.interval
        given = f"rebalancer.interval={asked} ({origin})"
        option = f"--interval {asked}" if origin == COMMAND_LINE else given
        raise TraceError(f"{has}: with {option} none are left to score")
    return settings.replaced("rebalancer.interval", interval)


def planner_for(load: LoadTrace, topology: Topology, settings: Settings) -> PlannerOptions:
    """The options of the planner: with `simulate.expert_mb`, a number for `move_price: auto`.

    Raises:
        ConfigError: the duration of a transfer is 0 or not finite.
    """
    size, options = settings.simulate.expert_mb, settings.rebalancer
    if size is None:
        return settings.planner
    cost = MoveCost(
        expert_bytes=1e6 * size,
        bandwidth=default_bandwidth(topology, options.bandwidth),
        num_ranks=topology.num_ranks,
        num_layers=busy_layers(load),
        step_seconds=options.step_ms / 1000 * load.engine_steps,
        interval=options.interval,
        serving_share=serving_share(options.mode),
    )
    return with_price(settings.planner, cost, topology)


def topology_for(load: LoadTrace, options: SimulateOptions) -> Topology:
    """The topology of the options; without `slots` and `rank_slots`, there is one spare slot per rank.

    Raises:
        TopologyError: the numbers contradict each other, or there are more experts than slots.
    """
    rank_slots = options.rank_slots
    ranks = options.ranks if rank_slots is None else len(rank_slots)
    slots = (-(-load.num_experts // ranks) + 1) * ranks if rank_slots is None else sum(rank_slots)
    topology = Topology(
        num_nodes=options.nodes,
        num_ranks=ranks,
        num_slots=options.slots or slots,
        num_groups=options.groups,
        rank_slots=rank_slots,
    )
    topology.check_experts(load.num_experts)
    return topology


def _read(source: str) -> LoadTrace | TokenTrace:
    if not source:
        raise TraceError(f"the name of the load is empty; give a file, or one of {', '.join(PROFILES)}")
    suffixes = {item.suffix for item in LOAD_FORMATS.values() if item.suffix}
    looks_like_a_file = os.sep in source or Path(source).suffix.lower() in suffixes
    if not looks_like_a_file and not os.path.exists(source):
        raise TraceError(f"{source}: no such file, and no traffic profile; there are {', '.join(PROFILES)}")
    return read_trace(source)
