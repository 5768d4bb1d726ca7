"""The load that a command works on, and the interval and the slots that suit it where none are given."""

from __future__ import annotations

import os
from pathlib import Path

from ..config.options import SimulateOptions
from ..config.sources import Settings
from ..core.errors import ConfigError, TraceError
from ..core.topology import Topology
from ..formats.loads import LOAD_FORMATS, read_trace
from ..offline.synthetic_traffic import PROFILES, generate
from ..offline.token_replay import fold_decode, fold_prefill
from ..offline.traces import LoadTrace
from .wording import COMMAND_LINE, counted

__all__ = ["fit_interval", "load_for", "topology_for", "with_interval"]

_INTERVALS = 8
"""Intervals of traffic that is made, and at least those of a load whose interval is chosen for it."""

_GENERATED, _RECORDED = "generated traffic", "a recorded load"
_DECODE, _PREFILL = "a token trace in decode mode", "a token trace in prefill mode"
_USED_FOR = {
    "mode": (_DECODE, _PREFILL),
    "batch": (_DECODE,),
    "max_tokens": (_PREFILL,),
    **dict.fromkeys(("steps", "drift", "seed"), (_DECODE, _GENERATED)),
}


def load_for(source: str, settings: Settings, *, alone: bool = True) -> LoadTrace:
    """The load that `source`, a file or the name of a traffic profile, stands for.

    Args:
        source: a path, or a name of `PROFILES`.
        settings: their section `simulate` says how tokens and profiles become steps.
        alone: whether the options are for this source only, so that one on the command line which is of no
            use for it has to be a mistake.

    Raises:
        TraceError: there is no such file or profile, it is not a trace, or it holds no tokens.
        ConfigError: an option that is of no use for it.
    """
    options = settings.simulate
    steps = options.steps or _INTERVALS * settings.rebalancer.interval
    if source in PROFILES:
        _refuse_unused(source, _GENERATED, settings, alone)
        return generate(
            source,
            steps=steps,
            tokens_per_step=options.tokens_per_step,
            topics=options.topics,
            drift=options.drift,
            period=options.period,
            seed=options.seed,
        )
    _check_there(source)
    trace = read_trace(source)
    if isinstance(trace, LoadTrace):
        _refuse_unused(source, _RECORDED, settings, alone)
        if not bool(trace.load.any()):
            raise TraceError(f"{trace.name}: holds no load: all {trace.load.numel()} values are 0")
        return trace
    if options.mode == "prefill":
        _refuse_unused(source, _PREFILL, settings, alone)
        return fold_prefill(trace, options.max_tokens)
    _refuse_unused(source, _DECODE, settings, alone)
    return fold_decode(
        trace, options.batch, steps=steps, drift=options.drift, period=options.period, seed=options.seed
    )


def fit_interval(settings: Settings, load: LoadTrace) -> Settings:
    """The settings, with an interval that leaves several to score of a short load, unless one is configured.

    Raises:
        TraceError: the load is not longer than one interval.
    """
    interval, origin = settings.rebalancer.interval, settings.origins.get("rebalancer.interval")
    if origin is None:
        interval = max(1, min(interval, load.num_steps // _INTERVALS))
    if load.num_steps <= interval:
        has = f"{load.name} has {counted(load.num_steps, 'step')}"
        if origin is None:
            raise TraceError(f"{has}: none is left to score after a rebalance")
        option = f"rebalancer.interval={interval} ({origin})"
        option = f"--interval {interval}" if origin == COMMAND_LINE else option
        raise TraceError(f"{has}: with {option} none are left to score")
    return with_interval(settings, interval)


def with_interval(settings: Settings, interval: int) -> Settings:
    """The settings with another `rebalancer.interval`."""
    rebalancer = settings.rebalancer.model_copy(update={"interval": interval})
    return settings.model_copy(update={"rebalancer": rebalancer})


def topology_for(load: LoadTrace, options: SimulateOptions) -> Topology:
    """The topology that the options describe; without `slots` and `rank_slots`, one spare slot per rank.

    Raises:
        TopologyError: the numbers do not fit together, or there are more experts than slots.
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


def _check_there(source: str) -> None:
    """Tell a profile that is not known from a file that is not there."""
    if not source:
        raise TraceError(f"the name of the load is empty; give a file, or one of {', '.join(PROFILES)}")
    suffixes = {item.suffix for item in LOAD_FORMATS.values() if item.suffix}
    looks_like_a_file = os.sep in source or Path(source).suffix.lower() in suffixes
    if not looks_like_a_file and not os.path.exists(source):
        raise TraceError(f"{source}: no such file, and no traffic profile; there are {', '.join(PROFILES)}")


def _refuse_unused(source: str, kind: str, settings: Settings, alone: bool) -> None:
    for option, kinds in _USED_FOR.items():
        given = settings.origins.get(f"simulate.{option}") == COMMAND_LINE
        if given and alone and kind not in kinds:
            raise ConfigError(
                f"--{option.replace('_', '-')} is of no use for {source}, {kind}; it is for "
                f"{' or '.join(kinds)}"
            )
