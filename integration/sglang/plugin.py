"""SGLang's entry point: `--enable-eplb --eplb-algorithm eplb_plugin` plans with this package.

SGLang calls `register` in each of its processes. Servers with another algorithm are left alone.
"""

from __future__ import annotations

import inspect
import logging
import pkgutil
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from typing import Any

import torch

from ...core.errors import ConfigError
from ...core.placement import Placement
from ...core.topology import Topology
from ..adapters import Adapter
from .dispatch_seams import begin_dispatch, check_arguments, put_solvers_in_force
from .policy import ALGORITHM, SglangBalancer, is_first_rank, is_ours, parse_algorithm
from .seam_table import HOOKED, INIT_SOLVERS, LAUNCH_HOOK, NEW_METADATA, STATIC, STATIC_TABLE
from .seams import (
    algorithm_in_use,
    map_in_force,
    missing_seams,
    no_first_map,
    num_nodes,
    redundant_experts,
    row_mapping,
    static_table,
    warn_unmoved,
    watch,
)
from .static_dispatch import known_map, map_of_table

__all__ = ["ADAPTER", "balancer_of", "register"]

ADAPTER = Adapter(
    name="SGLang",
    package="sglang",
    entry_points="sglang.srt.plugins",
    allowed_plugins="SGLANG_PLUGINS",
    empty_allows_all=True,
    tested=("0.5.23",),
    how_to_enable=f"on in servers started with --enable-eplb --eplb-algorithm {ALGORITHM}",
)

_logger = logging.getLogger(__name__)

balancer_of = cache(SglangBalancer)
"""The balancer of this process for a value of `--eplb-algorithm`."""


def register() -> None:
    """Register the hooks. A missing function is logged here, and stops each launch with our algorithm."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if missing := missing_seams():
        _logger.error("eplb-plugin does not fit this SGLang: %s", "; ".join(missing))
    hooks: list[Callable[..., Any]] = [
        _compute_algorithm,
        _rebalance_experts,
        _first_map,
        _start,
        _in_time_order,
    ]
    for target, hook in zip(HOOKED, hooks, strict=True):
        HookRegistry.register(target, hook, HookType.AROUND)
    with suppress(ImportError, AttributeError):  # then it is among `missing`, and `_start` stops the launch
        pkgutil.resolve_name(LAUNCH_HOOK)("handle_eplb_and_dispatch")(_check_launch)
    if not missing_seams(STATIC):  # else SGLang's own table stays, and `_start` says so
        HookRegistry.register(NEW_METADATA, _new_metadata, HookType.AROUND)
        HookRegistry.register(STATIC_TABLE, _static_table, HookType.AROUND)
    with suppress(ImportError, AttributeError):  # then launches with `dispatch=balanced` that need it stop
        pkgutil.resolve_name(INIT_SOLVERS)
        HookRegistry.register(INIT_SOLVERS, _init_solvers, HookType.AROUND)


def _check_launch(server_args: Any, previous: Callable[[Any], None]) -> None:
    """Stop the launch on an error that SGLang would meet hours later, at the first rebalance."""
    algorithm = str(server_args.eplb_algorithm)
    if is_ours(algorithm):
        _check_seams(algorithm)
        if untested := ADAPTER.untested(_version()):
            _logger.warning(untested)
        options = parse_algorithm(algorithm)
        if not server_args.enable_eplb:
            raise ConfigError(
                f"--eplb-algorithm {algorithm} does nothing without --enable-eplb; give both or neither"
            )
        if (elastic := getattr(server_args, "elastic_ep_backend", None)) is not None:
            raise ConfigError(
                f"--eplb-algorithm {algorithm} cannot plan around failed ranks: "
                f"--elastic-ep-backend {elastic} needs an algorithm of SGLang's"
            )
        if options.dispatch == "balanced":
            check_arguments(server_args, algorithm)
    previous(server_args)


def _check_seams(algorithm: str) -> None:
    if missing := missing_seams():
        raise ConfigError(
            f"--eplb-algorithm {algorithm}: this SGLang ({_version()}, tested: {', '.join(ADAPTER.tested)}) "
            f"lacks what eplb-plugin hooks into: {'; '.join(missing)}"
        )


def _version() -> str:
    from sglang.version import __version__

    return str(__version__)


def _compute_algorithm(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Our name, options and all, becomes the object that `_rebalance_experts` knows."""
    algorithm = _arguments(original, args, kwargs)["raw_algorithm"]
    return balancer_of(algorithm) if is_ours(algorithm) else original(*args, **kwargs)


def _rebalance_experts(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Plan, if the algorithm is ours. Runs on all ranks alike, within a forward pass or at load."""
    given = _arguments(original, args, kwargs)
    balancer = given["algorithm"]
    if not isinstance(balancer, SglangBalancer):
        return original(*args, **kwargs)
    counts = given["tokens_per_expert"]
    slots = int(given["num_physical_experts"])
    topology = Topology(
        num_nodes=int(given["num_nodes"]),
        num_ranks=slots // int(given["num_local_physical_experts"]),
        num_slots=slots,
        num_groups=int(given["num_groups"] or 1),
    )
    current = map_in_force()
    balancer.planner.static = static_table(balancer.options)
    if current is None:
        return balancer.place_at_start(counts, topology, slots - redundant_experts())
    return balancer.rebalance(counts, topology, current.physical_to_logical_map_cpu)


def _first_map(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Refuse numbers and models that SGLang ends with a bare assertion on, or hours later."""
    algorithm = algorithm_in_use()
    if not is_ours(algorithm):
        return original(*args, **kwargs)
    model_config = _arguments(original, args, kwargs)["model_config"]
    if refused := no_first_map(model_config):
        raise ConfigError(f"--eplb-algorithm {algorithm}: {refused}")
    return original(*args, **kwargs)


def _start(original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """SGLang makes its manager when the model loads: get the planner ready then."""
    original(*args, **kwargs)
    algorithm = algorithm_in_use()
    if is_ours(algorithm):
        _check_seams(algorithm)
        current = map_in_force()
        balancer = balancer_of(algorithm)
        balancer.planner.static = static_table(balancer.options)
        balancer.start(current.physical_to_logical_map, current.num_logical_experts)
        if is_first_rank() and balancer.planner.static is not None:
            _logger.info("%s", _about_table(balancer))
        watch(args[0], balancer)
        balancer.before_first = partial(_before_first, args[0], balancer)
        if balancer.options.dispatch == "balanced":
            begin_dispatch(args[0], balancer)


def _new_metadata(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """SGLang makes its tables of a map."""
    with known_map(_arguments(original, args, kwargs)["physical_to_logical_map"]):
        return original(*args, **kwargs)


def _static_table(original: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
    """With our algorithm, the table of dispatch `static` is fair. Each rank makes its own row."""
    algorithm, ids = algorithm_in_use(), map_of_table()
    if ids is None or not is_ours(algorithm) or balancer_of(algorithm).options.engine_table:
        return original(*args, **kwargs)
    given = _arguments(original, args, kwargs)
    lists = given["logical_to_all_physical_map"]
    ranks, slots = int(given["ep_size"]), int(given["num_physical_experts"])
    topology = Topology(num_nodes=num_nodes(), num_ranks=ranks, num_slots=slots)
    row = balancer_of(algorithm).planner.row(Placement(ids.cpu(), lists.shape[1]), topology, given["ep_rank"])
    return row.to(lists.device, lists.dtype)


def _about_table(balancer: SglangBalancer) -> str:
    """A line on dispatch `static`."""
    if balancer.planner.static == "fair":
        return "dispatch=even: the replicas of an expert serve equally many ranks, near ones first"
    missing = missing_seams(STATIC)
    asked = "mode=observe" if balancer.options.mode == "observe" else "dispatch=engine"
    why = f"this SGLang lacks {'; '.join(missing)}" if missing else asked
    return f"{why}: SGLang's own table stays, in which each rank asks its nearest replica"


def _before_first(manager: Any, balancer: SglangBalancer) -> None:
    """The model is loaded, and its experts are about to move for the first time."""
    warn_unmoved(manager, balancer.planner.warn)
    balancer.planner.mapping = row_mapping(manager)


def _init_solvers(original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """With `dispatch=balanced`, the solvers of SGLang's `--ep-dispatch-algorithm lp` are ours."""
    algorithm = algorithm_in_use()
    if not is_ours(algorithm) or balancer_of(algorithm).options.dispatch != "balanced":
        original(*args, **kwargs)
        return
    balancer, model_config = balancer_of(algorithm), _arguments(original, args, kwargs)["model_config"]
    balancer.solvers = put_solvers_in_force(model_config, algorithm, balancer.solvers)


def _in_time_order(original: Callable[..., torch.Tensor], buffer: Any) -> torch.Tensor:
    """SGLang's ring of steps from the oldest on. Steps for moving chunks of layers turn the ring further."""
    steps = original(buffer)
    # Rolling copies the whole ring; without chunks of layers it is full, and in order, when it is asked for.
    in_order = buffer._curr_index == 0 or not is_ours(algorithm_in_use())
    return steps if in_order else steps.roll(-buffer._curr_index, 0)


def _arguments(function: Callable[..., Any], args: Any, kwargs: Any) -> dict[str, Any]:
    return inspect.signature(function).bind(*args, **kwargs).arguments
