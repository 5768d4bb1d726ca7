"""What the planner hooks into and reads in SGLang: functions, placement, manager, weights."""

from __future__ import annotations

import logging
import pkgutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Literal

from ...runtime.verify.unregistered import describe_unregistered, find_unregistered
from ..common.expert_bytes import bytes_of_one_expert
from ..common.options import EngineOptions, uneven_slots
from ..common.recording import ModelRecorder
from ..common.seams import has_member, missing_here, seams_of
from ..common.shares import IndexMapping
from ..common.telemetry import engine_telemetry
from .policy import SglangBalancer, is_first_rank
from .seam_table import PLANNING, RING, STATIC

__all__ = [
    "algorithm_in_use",
    "map_in_force",
    "missing_seams",
    "no_first_map",
    "num_nodes",
    "redundant_experts",
    "row_mapping",
    "static_table",
    "warn_unmoved",
    "watch",
]

_logger = logging.getLogger(__name__)

_WEIGHTS = "routed_experts_weights_of_layer"
"""Where SGLang looks for the weights of a model's experts, layer by layer."""


def missing_seams(needed: Mapping[str, tuple[str, ...]] | None = None) -> list[str]:
    """What this SGLang lacks, one line for each function and argument.

    Args:
        needed: functions and classes, and the arguments that are used. None: what the planner needs.
    """
    if needed is not None:
        return missing_here(seams_of(needed))
    missing = missing_here(seams_of(PLANNING))
    with suppress(ImportError, AttributeError):  # then it is missing already
        if "_curr_index" not in pkgutil.resolve_name(f"{RING}.__init__").__code__.co_names:
            missing.append(f"{RING} has no _curr_index")
    return missing


def algorithm_in_use() -> str:
    """The algorithm of this process's server; empty where that never rebalances."""
    from sglang.srt.runtime_context import get_exec

    moe = get_exec().moe
    return str(moe.eplb_algorithm) if moe.enable_eplb else ""


def map_in_force() -> Any:
    """SGLang's ExpertLocationMetadata, or None while the model has no placement yet."""
    from sglang.srt.eplb.expert_location import get_global_expert_location_metadata

    return get_global_expert_location_metadata()


def redundant_experts() -> int:
    """The value of `--ep-num-redundant-experts`."""
    from sglang.srt.runtime_context import get_exec

    return int(get_exec().moe.ep_num_redundant_experts)


def num_nodes() -> int:
    """Nodes of the model's ranks."""
    from sglang.srt.runtime_context import get_parallel

    return int(get_parallel().nnodes)


def static_table(options: EngineOptions) -> Literal["fair", "engine"] | None:
    """Whose table SGLang's dispatch `static` reads here; None with another dispatch."""
    from sglang.srt.runtime_context import get_exec

    if get_exec().moe.ep_dispatch_algorithm != "static":
        return None
    return "engine" if options.engine_table or missing_seams(STATIC) else "fair"


def row_mapping(manager: Any) -> IndexMapping | None:
    """SGLang's own mapping by the row of a token, without an all-to-all backend; else None.

    With such a backend and dispatch `dynamic` it draws replicas at random, which is even. To be called just
    before the first rebalance, as `warn_unmoved`.
    """
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
    from sglang.srt.runtime_context import get_exec, get_parallel

    moe = get_exec().moe
    if moe.moe_a2a_backend != "none" or moe.ep_dispatch_algorithm != "dynamic":
        return None
    experts = [part.top_k for part in manager._get_model().modules() if isinstance(part, FusedMoE)]
    return IndexMapping(1, experts[0] * int(get_parallel().tp_size)) if experts else None


def no_first_map(model_config: Any) -> str | None:
    """Why SGLang cannot place the experts of a model, and what to give or remove; None where it can."""
    from sglang.srt.eplb.expert_location import ModelConfigForExpertLocation
    from sglang.srt.model_loader.utils import get_model_architecture
    from sglang.srt.runtime_context import get_parallel

    remove = "Remove --enable-eplb, --eplb-algorithm and --ep-num-redundant-experts"
    name = ", ".join(getattr(model_config.hf_config, "architectures", None) or ["this model"])
    model = ModelConfigForExpertLocation.from_model_config(model_config)
    if model is None:
        return f"{name} has no EPLB support in this SGLang: no expert would move. {remove}"
    if not has_member(get_model_architecture(model_config)[0], _WEIGHTS):
        return f"{name} has no {_WEIGHTS} in this SGLang, which would end at its first rebalance. {remove}"
    ranks = int(get_parallel().ep_size)
    return uneven_slots(
        int(model.num_logical_experts), redundant_experts(), ranks, "--ep-num-redundant-experts"
    )


def watch(manager: Any, balancer: SglangBalancer) -> None:
    """Read weight sizes from SGLang's EPLBManager. On the first rank, show its rebalances and record loads.

    Raises:
        ConfigError: the folder for recordings cannot be made.
    """

    def expert_bytes() -> dict[int, int]:
        layers = manager._get_model().routed_experts_weights_of_layer
        return {layer: bytes_of_one_expert(tensors) for layer, tensors in layers.items()}

    balancer.expert_bytes = expert_bytes
    options = balancer.options
    telemetry = engine_telemetry(options, is_first_rank())
    if options.record is not None and is_first_rank():
        # SGLang's maps have a row for each layer of the model, dense ones too.
        balancer.planner.recorder = ModelRecorder(
            options.record, options.record_mib, "SGLang", _model_name(), (), _token_copies()
        )
    if telemetry is None and balancer.planner.recorder is None:
        return
    model = None if telemetry is None else telemetry.of(_model_name())
    pass_ended = manager.on_forward_pass_end

    def counting() -> None:
        # Before: the pass may end with a rebalance, which starts the count anew.
        balancer.step_times.stepped()
        if model is not None:
            model.stepped()
        pass_ended()

    manager.on_forward_pass_end = counting
    balancer.planner.telemetry = model


def warn_unmoved(manager: Any, warn: Callable[[str, str], object]) -> None:
    """Warn, on the first rank, of tensors that look like an expert's and that SGLang will not move.

    To be called just before the first move: SGLang's EPLBManager keeps the model's first answer, and before
    loading that would name the wrong tensors. Raises nothing. `warn` gets a cause and a line.
    """
    if not is_first_rank():
        return
    try:
        from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE

        model = manager._get_model()
        moved = model.routed_experts_weights_of_layer
        experts = {part.layer_id: part for part in model.modules() if isinstance(part, FusedMoE)}
        layers = sorted(experts.keys() & moved.keys())
        if layers:
            slots = experts[layers[0]].num_local_experts
            weights = [moved[n] for n in layers]
            found = find_unregistered([experts[n] for n in layers], weights, slots, layers)
            if line := describe_unregistered([found]):
                warn("unmoved_tensors", line)
    except Exception:
        _logger.exception("whether SGLang moves all weights of the experts could not be checked; it goes on")


def _token_copies() -> int:
    """Ranks that count each token: all of them, unless an all-to-all backend sends tokens between them."""
    from sglang.srt.runtime_context import get_exec, get_parallel

    return int(get_parallel().tp_size) if get_exec().moe.moe_a2a_backend == "none" else 1


def _model_name() -> str:
    """The name under which SGLang's own metrics show the model."""
    from sglang.srt.runtime_context import get_serving

    return str(get_serving().served_model_name)
