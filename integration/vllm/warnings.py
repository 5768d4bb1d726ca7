"""Where vLLM balances less than it seems to, or not at all, without a word: each is detected and named."""

from __future__ import annotations

import functools
import inspect
import logging
import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch

from ...core.errors import ConfigError, EplbError
from ..common.options import uneven_slots

__all__ = [
    "StallWatch",
    "dropped_plan",
    "drops_small_plans",
    "layer_ids_of",
    "long_window",
    "model_names",
    "never_stepped",
    "watch_load",
]

_logger = logging.getLogger(__name__)

_LAYER = re.compile(r"\.layers\.(\d+)\.")

_PATIENCE = 3
"""Intervals until a rearrangement that has not ended is warned of. Usually it takes a fraction of one."""

_LEAST_GAIN = 0.05
# vLLM computes in float32, so a plan at its threshold could be dropped there and reported as applied here.
_MARGIN = 1e-4


def watch_load(worker: Any, unsupported: Callable[[str], None]) -> None:
    """Have `worker` say after loading its model whether vLLM balances it, and why its numbers do not fit.

    Args:
        worker: of vLLM, with EPLB.
        unsupported: gets a line where the model has no EPLB support.
    """
    load = worker.load_model

    @functools.wraps(load)
    def loading(*args: Any, **kwargs: Any) -> Any:
        try:
            result = load(*args, **kwargs)
        except EplbError:
            raise
        except Exception as error:
            # vLLM names the numbers, and not the ones that would do.
            if told := _uneven(worker.vllm_config):
                raise ConfigError(f"{told} (vLLM: {error})") from error
            raise
        try:
            told = _without_eplb(worker)
        except Exception:
            _logger.exception("whether vLLM balances this model could not be checked; it goes on")
        else:
            if told is not None:
                unsupported(told)
        return result

    worker.load_model = loading


def _uneven(config: Any) -> str | None:
    """See `uneven_slots`, of vLLM's configuration."""
    parallel = config.parallel_config
    ranks = parallel.tensor_parallel_size * parallel.data_parallel_size
    ranks *= getattr(parallel, "prefill_context_parallel_size", 1)
    redundant = parallel.eplb_config.num_redundant_experts
    return uneven_slots(config.model_config.get_num_experts(), redundant, ranks, "num_redundant_experts")


def _without_eplb(worker: Any) -> str | None:
    """What to remove where vLLM does not balance the loaded model, else None."""
    from vllm import __version__
    from vllm.model_executor.models.interfaces import get_mixture_of_experts_model

    model = worker.get_model()
    if get_mixture_of_experts_model(model) is not None:
        return None
    return (
        f"{worker.model_config.model} ({type(model).__name__}) is no MixtureOfExperts in vLLM {__version__}: "
        "no expert will move, and vLLM may end with a bare AssertionError at its first step. Remove "
        "--enable-eplb, num_redundant_experts of --eplb-config, and eplb_plugin of --additional-config"
    )


def model_names(state: Any) -> list[str]:
    """A name for each model of an `EplbState`: vLLM's, with a number after its second use.

    With pipeline parallelism, each stage balances layers of its own: stage and layers are in the name.
    """
    names = [model.model_name + _stage(state, model) for model in state.model_states.values()]
    seen = [names[:n].count(name) for n, name in enumerate(names)]
    return [f"{name} ({count})" if count else name for name, count in zip(names, seen, strict=True)]


def _stage(state: Any, model_state: Any) -> str:
    """The pipeline stage of this process, counted from 1, and its MoE layers as the model numbers them.

    Example: ", stage 2 of 2, MoE layers 30 to 59". Empty with one stage.
    """
    if getattr(getattr(state, "parallel_config", None), "pipeline_parallel_size", 1) == 1:
        return ""
    from vllm.distributed.parallel_state import get_pp_group

    group = get_pp_group()
    names = [getattr(layer, "layer_name", "") for layer in model_state.model.moe_layers]
    layers = [int(found[1]) for name in names if (found := _LAYER.search(name))]
    told = f", MoE layers {min(layers)} to {max(layers)}" if layers else ""
    return f", stage {group.rank_in_group + 1} of {group.world_size}{told}"


def layer_ids_of(model: Any) -> tuple[int, ...]:
    """The layers of a model that are MoE layers, by the names of these; empty where they do not say."""
    names = [str(getattr(layer, "layer_name", "")) for layer in model.moe_layers]
    found = [_LAYER.search(name) for name in names]
    ids = tuple(int(match[1]) for match in found if match)
    return ids if len(ids) == len(names) and all(a < b for a, b in pairwise(ids)) else ()


def long_window(state: Any) -> str | None:
    """A line where the window of an `EplbState` is longer than its interval, else None."""
    interval = state.expert_rearrangement_step_interval
    rings = [model.expert_load_window for model in state.model_states.values()]
    window = max(ring.shape[0] for ring in rings)
    if window <= interval:
        return None
    unused = sum(ring[0].numel() * ring.element_size() * (ring.shape[0] - interval) for ring in rings)
    return (
        f"window_size={window} is longer than step_interval={interval}: only steps since the last map count. "
        f"window_size={interval} records the same, and frees {unused / 2**20:.1f} MiB a rank"
    )


def never_stepped() -> str | None:
    """A line where vLLM counts no steps of EPLB in this process, else None.

    Its model runner V1 counts a step after sampling. Pooling models sample nothing. Of a pipeline only the
    last stage samples, except with an external launcher.
    """
    from vllm.config import get_current_vllm_config_or_none
    from vllm.distributed.parallel_state import get_pp_group

    config = get_current_vllm_config_or_none()
    if config is None or config.use_v2_model_runner:
        return None
    if config.model_config.runner_type == "pooling":
        what = "pooling models"
    elif (
        config.parallel_config.pipeline_parallel_size > 1
        and config.parallel_config.distributed_executor_backend != "external_launcher"
        and not get_pp_group().is_last_rank
    ):
        what = "the stages of a pipeline before the last one"
    else:
        return None
    return (
        f"vLLM's model runner V1 counts no steps of {what}: no expert will move there. Model runner V2 does "
        "(VLLM_USE_V2_MODEL_RUNNER=1)"
    )


class StallWatch:
    """Warns of an asynchronous rearrangement that does not end: vLLM then plans no more, and serves on.

    Args:
        state: an `EplbState`.
        warn: gets the name of the model, and a line; the line is empty for each further interval.
    """

    def __init__(self, state: Any, warn: Callable[[str, str], None]) -> None:
        self._state = state
        self._warn = warn

    def stepped(self) -> None:
        """A forward step has ended. Host work only."""
        state = self._state
        waited, rest = divmod(
            state.expert_rearrangement_step, max(state.expert_rearrangement_step_interval, 1)
        )
        if not state.is_async or rest or waited < _PATIENCE:
            return
        for name, model in zip(model_names(state), state.model_states.values(), strict=True):
            if model.rebalanced:
                line = (
                    f"the asynchronous rearrangement of {name} began {state.expert_rearrangement_step} steps "
                    f"ago and has not ended within {_PATIENCE} intervals: vLLM plans nothing until it does. "
                    "After an 'async loop error' in the log it never will: restart vLLM"
                )
                self._warn(name, line if waited == _PATIENCE else "")


def drops_small_plans(state: Any) -> bool:
    """Whether vLLM drops plans of this `EplbState` that gain little: on ROCm, in its synchronous mode."""
    if torch.version.hip is None or state.is_async:
        return False
    # A vLLM without the rule does not ask for the platform there.
    return "is_rocm" in inspect.unwrap(type(state).rearrange).__code__.co_names


def dropped_plan(load: torch.Tensor, old: torch.Tensor, new: torch.Tensor, num_ranks: int) -> str | None:
    """Why vLLM would drop a plan by its rule for ROCm, else None.

    The rule compares max over mean of rank loads that are summed over all layers: layers whose hot ranks
    differ look balanced there. Example: 1.200 before and 1.150 after are 4.2 %, and dropped.

    Args:
        load: [layers, logical], tokens, as vLLM gives it to its policy.
        old, new: int64 [layers, slots], the map in force and the plan.
    """
    before, after = (_imbalance(load, ids, num_ranks) for ids in (old, new))
    gain = (before - after) / before
    if gain >= _LEAST_GAIN + _MARGIN:
        return None
    return (
        f"vLLM on ROCm drops it: max over mean rank load, summed over layers, goes from {before:.3f} to "
        f"{after:.3f}, which is below {_LEAST_GAIN:.0%}"
    )


def _imbalance(load: torch.Tensor, ids: torch.Tensor, num_ranks: int) -> float:
    load, ids = load.to("cpu", torch.float64), ids.to("cpu", torch.int64)
    count = torch.zeros_like(load).scatter_add_(1, ids, torch.ones(ids.shape, dtype=torch.float64))
    per_slot = (load / count.clamp(min=1)).gather(1, ids)
    per_rank = per_slot.view(len(load), num_ranks, -1).sum((0, 2))
    mean = float(per_rank.mean())
    return float(per_rank.max()) / mean if mean else 1.0
