"""Everything that is wrapped or read in one `EplbState` of vLLM: policy, steps, rearrangements, weights."""

from __future__ import annotations

import functools
import inspect
import logging
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from ...core.topology import Topology
from ...dispatch.shares import VLLM_HASH
from ...observability.prometheus import Telemetry
from ...planning.planner import warmup
from ...runtime.control.rank_group import RankGroup
from ...runtime.move_times import StepTimes
from ..common.expert_bytes import bytes_of_one_expert
from ..common.options import EngineOptions
from ..common.seams import missing_here
from ..common.shares import IndexMapping
from ..common.telemetry import engine_telemetry
from .dispatch import bind_dispatch, token_copies
from .policy import Interval, RecordedModel, VllmPolicy
from .seam_table import PLANNING
from .startup import check_start
from .warnings import StallWatch, drops_small_plans, layer_ids_of, model_names
from .window import RingKeeper, fold_window, no_samples, no_window, sample_window, sum_over_ranks

__all__ = [
    "bind_policy",
    "expert_bytes",
    "missing_seams",
    "wrap_rearrange",
    "wrap_step",
]

_logger = logging.getLogger(__name__)

_READ_OF_STATES = ("expert_load_window", "model_name", "physical_to_logical_map", "rebalanced")
_READ_OF_MODELS = ("num_expert_groups", "num_logical_experts", "num_moe_layers", "num_physical_experts")


def bind_policy(
    state: Any,
    options: EngineOptions,
    about: str,
    made: Callable[[VllmPolicy], object],
    compare: Callable[[Sequence[int]], None],
) -> None:
    """Have `state` plan with our policy from its first model on. Only this object is changed, no class.

    Args:
        state: an `EplbState` without models.
        about: versions and options, for the log.
        made: gets the policy when there is one.
        compare: called once with the ranks of the group; raises where they were started otherwise.
    """
    add_model = state.add_model
    policy: VllmPolicy | None = None

    # vLLM sets its own policy anew with every model that it adds.
    @functools.wraps(add_model)
    def add(*args: Any, **kwargs: Any) -> Any:
        nonlocal policy
        result = add_model(*args, **kwargs)
        if policy is None:
            compare(_ep_group().ranks)
            if missing := _missing_fields(state):
                _logger.error(
                    "eplb_plugin is enabled, but this vLLM's models lack what it reads: %s. vLLM's own "
                    "policy plans instead",
                    ", ".join(missing),
                )
                state.add_model = add_model
                return result
            policy = _make_policy(state, options)
            made(policy)
            _warm_up(state, options)
        state.policy = policy
        policy.dispatch = bind_dispatch(state, options, _ep_group())
        policy.know(model_names(state)[-1], _recorded_model(state))
        if policy.telemetry is not None:
            policy.telemetry.of(model_names(state)[-1])
        if _is_first_rank():
            _say(state, options, about)
        check_start(state, policy.planner_of(model_names(state)[-1]), _plan_ranks)
        return result

    state.add_model = add


def expert_bytes(model: Any) -> dict[int, int]:
    """Bytes of an expert's weights, by MoE layer, of a model with vLLM's `expert_weights`."""
    return {layer: bytes_of_one_expert(tensors) for layer, tensors in enumerate(model.expert_weights)}


def missing_seams() -> list[str]:
    """What this vLLM lacks of the names that a plan needs; empty when all are there."""
    return missing_here(PLANNING)


def _missing_fields(state: Any) -> list[str]:
    """Fields of the models of a state that the plugin reads and that are absent."""
    missing = []
    for model_state in state.model_states.values():
        missing += [f"EplbModelState.{name}" for name in _READ_OF_STATES if not hasattr(model_state, name)]
        missing += [f"model.{name}" for name in _READ_OF_MODELS if not hasattr(model_state.model, name)]
    return missing


def _make_policy(state: Any, options: EngineOptions) -> VllmPolicy:
    policy = VllmPolicy(options, state.policy, _plan_ranks, speaks=_is_first_rank())
    policy.telemetry = engine_telemetry(options, _is_first_rank())
    policy.drops_small_plans = drops_small_plans(state)
    ring = RingKeeper(state)
    watch = StallWatch(state, lambda model, line: policy.planner_of(model).warn("stalled_transfer", line))
    times = StepTimes()
    wrap_step(state, ring, policy.telemetry, watch, times)
    wrap_rearrange(state, ring, policy, times)
    return policy


def wrap_step(
    state: Any,
    ring: RingKeeper,
    telemetry: Telemetry | None,
    watch: StallWatch | None = None,
    times: StepTimes | None = None,
) -> None:
    """Have `state` count and time its forward steps, but for profiling ones, clear its rings, and watch for
    stalls."""
    step = state.step

    @functools.wraps(step)
    def stepping(is_dummy: bool = False, is_profile: bool = False, *args: Any, **kwargs: Any) -> Any:
        # Before: the step may end with a rebalance, which starts the count anew.
        if telemetry is not None and not is_profile:
            telemetry.stepped()
        if times is not None and not is_profile:
            times.stepped()
        result = step(is_dummy, is_profile, *args, **kwargs)
        ring.clear()
        if watch is not None and not is_profile:
            watch.stepped()
        return result

    state.step = stepping


def wrap_rearrange(state: Any, ring: RingKeeper, policy: VllmPolicy, times: StepTimes | None = None) -> None:
    """Have `state` hand the snapshots of its window to the policy before each rearrangement."""
    rearrange = state.rearrange
    signature = inspect.signature(rearrange)

    @functools.wraps(rearrange)
    def rearranging(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        if given.get("is_profile"):
            policy.expect_profiling()
            return rearrange(*args, **kwargs)
        if given.get("rank_mapping") is not None or given.get("use_last_expert_load"):
            policy.expect_scaling()
        else:
            ring.clear()
            policy.expect(_intervals(state, policy, 0.0 if times is None else times.take()))
        result = rearrange(*args, **kwargs)
        ring.rearranged()
        return result

    state.rearrange = rearranging


def _intervals(state: Any, policy: VllmPolicy, step_seconds: float) -> list[Interval]:
    """Each model's load since the last rearrangement, summed over the ranks. All ranks call it together."""
    models, names = list(state.model_states.values()), model_names(state)
    error: Exception | None = None
    steps, position = state.expert_rearrangement_step_interval, state.expert_load_window_step
    snapshots = policy.options.snapshots
    # Recording may begin at any moment, on the ranks one after the other, and all sum the same shapes.
    samples = policy.options.samples
    try:
        loads = []
        for model in models:
            window = (
                model.expert_load_window,
                model.physical_to_logical_map,
                model.model.num_logical_experts,
            )
            loads += [
                fold_window(*window, position=position, steps=steps, snapshots=snapshots),
                sample_window(*window, position=position, steps=steps, samples=samples),
            ]
    except Exception as failure:
        # The others are about to sum: they have to hear of it there.
        error, loads = failure, []
        for model in models:
            size = model.expert_load_window, model.model.num_logical_experts
            loads += [
                no_window(*size, steps=steps, snapshots=snapshots),
                no_samples(*size, steps=steps, samples=samples),
            ]
    group = _ep_group().device_group
    all_reduce = functools.partial(dist.all_reduce, group=group)
    loads, failures = sum_over_ranks(loads, error is not None, all_reduce)
    # The main thread does not wait for the device; whoever plans does.
    *on_host, failures = (load.to("cpu", non_blocking=True) for load in (*loads, failures))
    ready = _arrival(loads[0].device)
    return [
        Interval(
            name,
            load,
            sampled,
            failures,
            ready,
            error,
            functools.partial(expert_bytes, model.model),
            steps,
            waits=not state.is_async,
            mapping=_own_mapping(model.model),
            step_seconds=step_seconds,
        )
        for name, load, sampled, model in zip(names, on_host[::2], on_host[1::2], models, strict=True)
    ]


def _own_mapping(model: Any) -> IndexMapping | None:
    """vLLM's hash of a token's index. None where a model does not say how many experts a token has."""
    config = getattr(model.moe_layers[0], "moe_config", None)
    if config is None:
        return None
    return IndexMapping(VLLM_HASH, config.experts_per_token * _ep_group().world_size)


def _recorded_model(state: Any) -> RecordedModel:
    """Of the model that was added last, for its recording. What it does not say is left out, and logged."""
    model = list(state.model_states.values())[-1].model
    parts = []
    if len(state.model_states) > 1:
        parts.append(re.sub(r"[^\w.-]+", "-", model_names(state)[-1]).strip("-."))
    try:
        parallel = state.parallel_config
        if parallel.pipeline_parallel_size > 1 and (stage := _pipeline_stage()):
            parts.insert(0, f"stage-{stage}")
        copies, layer_ids = token_copies(model, parallel, _ep_group().world_size), layer_ids_of(model)
    except AttributeError as error:
        if _is_first_rank():
            _logger.warning("a recording of %s will not name its layers: %s", model_names(state)[-1], error)
        copies, layer_ids = 1, ()
    return RecordedModel(layer_ids, copies, "/".join(parts))


def _warm_up(state: Any, options: EngineOptions) -> None:
    """Compile the planner, which mode `observe` does not need."""
    if options.mode == "observe":
        return
    model = next(iter(state.model_states.values())).model
    started = time.perf_counter()
    slots, groups = model.num_physical_experts, max(model.num_expert_groups, 1)
    topology = Topology(num_ranks=_ep_group().world_size, num_slots=slots, num_groups=groups)
    warmup(topology, dispatch=options.planner.for_dispatch(options.splits).dispatch)
    if _is_first_rank():
        _logger.info("eplb_plugin: the planner was set up in %.1f s", time.perf_counter() - started)


def _say(state: Any, options: EngineOptions, about: str) -> None:
    """Say that the plugin is active, for the model that was added last."""
    name, model = model_names(state)[-1], list(state.model_states.values())[-1].model
    how = f"{'asynchronously' if state.is_async else 'synchronously'} by policy {options.planner.policy}"
    does = "plans"
    if options.mode == "observe":
        does, how = "observes", "and leaves its map as it is"
    experts, slots = model.num_logical_experts, model.num_physical_experts
    sizes = f"{model.num_moe_layers} layers, {experts} experts, {slots} slots, {_ep_group().world_size} ranks"
    _logger.info("eplb_plugin %s: %s %s %s: %s", about, does, name, how, sizes)
    if drops_small_plans(state):
        _logger.warning(
            "on ROCm, vLLM's synchronous mode drops plans that lower max over mean rank load, summed over "
            "layers, by under 5 %%: reports say which. use_async of --eplb-config has no such rule"
        )


def _plan_ranks() -> RankGroup:
    """The ranks that compare their plans."""
    from vllm.distributed import parallel_state

    # In the asynchronous mode only vLLM's own thread uses this group, and it calls the policy; in the
    # synchronous mode only the main thread does, and it calls the policy. So all ranks agree in order. While
    # models are loaded, that thread has not begun yet.
    return RankGroup(parallel_state.get_eplb_group().cpu_group, "cpu")


def _pipeline_stage() -> int:
    from vllm.distributed import parallel_state

    return int(parallel_state.get_pp_group().rank_in_group)


def _ep_group() -> Any:
    from vllm.distributed import parallel_state

    return parallel_state.get_ep_group()


def _is_first_rank() -> bool:
    return bool(_ep_group().rank_in_group == 0)


def _arrival(device: torch.device) -> Callable[[], object]:
    """Waits for the copies to the host that were started just before."""
    if device.type == "cpu":
        return lambda: None
    event = torch.Event(device)
    event.record()
    return event.synchronize
