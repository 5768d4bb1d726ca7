"""What dispatch `balanced` replaces or reads in SGLang; with dispatch `even` none of it is needed."""

from __future__ import annotations

import logging
import pkgutil
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from ...core.errors import ConfigError
from ...core.topology import Topology
from ...dispatch.batch_split import GatherCounts
from ...dispatch.expert_cost import resolve_expert_cost
from ..common.agreement import announce
from ..common.replacement import replace_function
from ..common.shares import DispatchInForce
from .dispatch import NO_BACKEND, LayerSolvers, ServedSplit, check_dispatch, serve, to_slots
from .policy import SglangBalancer, is_first_rank
from .seam_table import INIT_SOLVERS, MAPPING, REPLICATED, SHARDED
from .seams import map_in_force, missing_seams

__all__ = ["begin_dispatch", "check_arguments", "put_solvers_in_force"]

_logger = logging.getLogger(__name__)

# In 0.5.23, every MoE block of these asks the solver with no tokens, too. SGLang's own list has more.
_ASK_WITHOUT_TOKENS = ("Qwen3MoeForCausalLM", "Glm4MoeForCausalLM", "MiniMaxM2ForCausalLM")


def check_arguments(server_args: Any, algorithm: str) -> None:
    """Stop the launch where batches cannot be split as a whole.

    Raises:
        ConfigError: this SGLang lacks a function, or other arguments do not fit.
    """
    _check_seams(REPLICATED, algorithm)  # `resolved_view` is among them
    from sglang.srt.arg_groups.overrides import resolved_view

    view = resolved_view(server_args)
    _check(view.moe_a2a_backend, view.ep_dispatch_algorithm, view.device or "cuda", algorithm)


def begin_dispatch(manager: Any, balancer: SglangBalancer) -> None:
    """Replace SGLang's mapping in this process. All ranks call it before the model loads.

    Args:
        manager: SGLang's EPLBManager.
        balancer: with the solvers, if each rank has its own tokens.

    Raises:
        ConfigError: see `check_arguments`; or ranks with tokens of their own exchange them in an unknown way.
    """
    from sglang.srt.layers.moe.utils import is_moe_input_scattered_across_dp_ranks
    from sglang.srt.runtime_context import get_exec, get_parallel

    moe, parallel, metadata = get_exec().moe, get_parallel(), map_in_force()
    device = metadata.physical_to_logical_map.device
    backend = moe.moe_a2a_backend
    _check(backend, moe.ep_dispatch_algorithm, device.type, balancer.algorithm)
    if backend == NO_BACKEND and is_moe_input_scattered_across_dp_ranks():
        raise ConfigError(
            "dispatch=balanced: ranks route tokens of their own before SGLang's FP4 all-gather; give "
            "--disable-flashinfer-cutlass-moe-fp4-allgather"
        )
    if backend != NO_BACKEND and balancer.solvers is None:
        raise ConfigError(
            f"dispatch=balanced with --moe-a2a-backend {backend}: SGLang made its own solvers, not those of "
            f"eplb_plugin; its log says why {INIT_SOLVERS} could not be hooked"
        )
    gather = None if backend == NO_BACKEND else _gather_over(parallel.moe_ep_group, metadata.ep_size)
    split = ServedSplit(
        Topology(num_ranks=metadata.ep_size, num_slots=metadata.num_physical_experts),
        metadata.num_logical_experts,
        rank=parallel.moe_ep_rank,
        expert_cost=partial(_expert_cost, manager, balancer.options.expert_cost, device),
        num_tokens=_num_tokens,
        gather=gather,
        device=device,
    )
    serve(split)
    copies = parallel.tp_size if gather is None else 1
    balancer.planner.dispatch = lambda: DispatchInForce(split.expert_cost, copies)
    replace_function(pkgutil.resolve_name(MAPPING), to_slots)
    if is_first_rank():
        seen = "every rank has all tokens" if gather is None else "ranks exchange their counts"
        _logger.info("dispatch=balanced: %s, expert_cost=%s", seen, balancer.options.expert_cost)


def put_solvers_in_force(
    model_config: Any, algorithm: str, solvers: LayerSolvers | None
) -> LayerSolvers | None:
    """In place of SGLang's `init_lplb_solvers`, whose solvers need kernels and sizes that ours do not.

    All ranks call it when the model loads, and after each change of the map.

    Args:
        solvers: those of an earlier call, to be changed; None at the first one.

    Returns:
        The solvers; None while there is no map.

    Raises:
        ConfigError: see `check_arguments`; or ranks without tokens leave out MoE blocks of this model.
    """
    metadata = map_in_force()
    if metadata is None:
        return None
    current = metadata.physical_to_logical_map_cpu
    if solvers is not None:
        solvers.update(current)
        return solvers
    _check_seams(SHARDED, algorithm)
    from sglang.srt.eplb.lplb_solver import set_global_lplb_solver

    _check_model(getattr(model_config.hf_config, "architectures", None) or ())
    topology = Topology(num_ranks=metadata.ep_size, num_slots=metadata.num_physical_experts)
    device = metadata.physical_to_logical_map.device
    solvers = LayerSolvers(current, metadata.num_logical_experts, topology, device)
    for layer, solver in enumerate(solvers.solvers):
        set_global_lplb_solver(layer, solver)
    return solvers


def _check(backend: str, dispatch_algorithm: str | None, device: str, algorithm: str) -> None:
    from sglang.srt.utils import is_cuda

    check_dispatch(backend, dispatch_algorithm, device, is_cuda())
    _check_seams(REPLICATED if backend == NO_BACKEND else SHARDED, algorithm)


def _check_seams(needed: Mapping[str, tuple[str, ...]], algorithm: str) -> None:
    if missing := missing_seams(needed):
        from sglang.version import __version__

        raise ConfigError(
            f"--eplb-algorithm {algorithm}: this SGLang ({__version__}) lacks what dispatch=balanced needs: "
            f"{'; '.join(missing)}. dispatch=even needs none of it"
        )


def _check_model(architectures: Sequence[str]) -> None:
    """Refuse models in which a rank without tokens would not take part in the message of each layer."""
    from sglang.srt.eplb.lplb_solver import assert_lplb_supported_model

    for name in architectures[:1]:
        if name in _ASK_WITHOUT_TOKENS:
            continue
        try:
            assert_lplb_supported_model(name)
        except NotImplementedError:
            raise ConfigError(
                f"dispatch=balanced with an all-to-all backend: a rank without tokens may leave out layers "
                f"of {name}, and the others would wait for it. Known to take part are "
                f"{', '.join(_ASK_WITHOUT_TOKENS)}, and models with SGLang's own --ep-dispatch-algorithm lp"
            ) from None


def _num_tokens() -> torch.Tensor | None:
    """integer [1], the tokens before the padding; None where SGLang knows none, or its rows are no prefix."""
    from sglang.srt.model_executor.forward_context import get_forward_context, has_forward_context

    if not has_forward_context():
        return None
    bound = get_forward_context().moe_num_token_non_padded
    tokens = None if bound is None else bound()
    return None if tokens is None else tokens.reshape(1)


def _gather_over(group: Any, num_ranks: int) -> GatherCounts:
    """One all-gather over SGLang's group of ranks that share the experts, also within captured graphs."""
    if group.world_size != num_ranks:
        raise ConfigError(f"SGLang's expert-parallel group has {group.world_size} ranks, its map {num_ranks}")

    def gather(counts: torch.Tensor) -> torch.Tensor:
        gathered: torch.Tensor = group.all_gather(counts, dim=0)
        return gathered.view(num_ranks, -1)

    return gather


def _expert_cost(manager: Any, option: int | str, device: torch.device) -> int:
    """The option in tokens. `auto` is read off the weights of the first layer and compared between ranks."""
    if isinstance(option, int):
        return option
    from sglang.srt.runtime_context import get_parallel

    layers = manager._get_model().routed_experts_weights_of_layer
    cost = resolve_expert_cost(option, layers[min(layers)], device)
    # Ranks with other accelerators would split otherwise, and tokens would be lost.
    announce(f"expert_cost={cost}")(get_parallel().moe_ep_group.ranks)
    return cost
