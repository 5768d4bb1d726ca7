"""The plugin that SGLang loads: `--enable-eplb --eplb-algorithm ensemble` plans with this package.

SGLang calls `register` in each of its processes, through the entry point of group `sglang.srt.plugins`.
Nothing changes for a server that names another algorithm.
"""

from __future__ import annotations

import inspect
import logging
import pkgutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache, partial
from types import MappingProxyType
from typing import Any

import torch

from ...core.errors import ConfigError
from ...core.topology import Topology
from .options import is_ours, parse_algorithm
from .policy import SglangBalancer, SglangMaps
from .telemetry import watch
from .weights import warn_unmoved

__all__ = ["TESTED_VERSIONS", "missing_hooks", "register"]

TESTED_VERSIONS = ("0.5.23",)
"""The versions of SGLang that the tests ran with."""

_EPLB = "sglang.srt.eplb"
_RING = f"{_EPLB}.expert_distribution._CircularBuffer"
_LAUNCH_HOOK = "sglang.srt.arg_groups.resolution_hooks.register_resolution_hook"
_HOOKED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        f"{_EPLB}.eplb_algorithms.compute_algorithm": ("raw_algorithm",),
        f"{_EPLB}.eplb_algorithms.rebalance_experts": (
            "tokens_per_expert",
            "num_physical_experts",
            "num_local_physical_experts",
            "num_groups",
            "num_nodes",
            "algorithm",
        ),
        f"{_EPLB}.eplb_manager.EPLBManager.__init__": ("self",),
        f"{_RING}.get_all": ("self",),
    }
)
"""What is hooked in SGLang, with the arguments that the hooks use."""

_logger = logging.getLogger(__name__)
_balancer: Callable[[str], SglangBalancer] = cache(SglangBalancer)


def register() -> None:
    """Register the hooks. What this SGLang lacks is said here; a launch that needs it is stopped."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    missing = missing_hooks()
    if missing:
        _logger.error("eplb-plugin does not fit this SGLang: %s", "; ".join(missing))
    functions: tuple[Callable[..., Any], ...] = (
        _compute_algorithm,
        _rebalance_experts,
        _start,
        _in_time_order,
    )
    for target, function in zip(_HOOKED, functions, strict=True):
        HookRegistry.register(target, function, HookType.AROUND)
    with suppress(ImportError, AttributeError):  # then it is among `missing`, and `_start` stops the launch
        pkgutil.resolve_name(_LAUNCH_HOOK)("handle_eplb_and_dispatch")(_check_launch)


def missing_hooks() -> list[str]:
    """What the plugin hooks into and this SGLang lacks, one line for each; empty when all is there."""
    missing = []
    for target, arguments in {**_HOOKED, f"{_RING}.__init__": (), _LAUNCH_HOOK: ("name",)}.items():
        try:
            function = pkgutil.resolve_name(target)
        except (ImportError, AttributeError) as error:
            missing.append(f"{target} is missing ({error})")
            continue
        known = inspect.signature(function).parameters
        missing += [f"{target} has no argument {name!r}" for name in arguments if name not in known]
        if target == f"{_RING}.__init__" and "_curr_index" not in function.__code__.co_names:
            missing.append(f"{_RING} has no _curr_index")
    return missing


def _check_launch(server_args: Any, previous: Callable[[Any], None]) -> None:
    """Stop the launch on what would otherwise fail hours later, at the first rebalance."""
    algorithm = str(server_args.eplb_algorithm)
    if is_ours(algorithm):
        _check_hooks(algorithm)
        if _version() not in TESTED_VERSIONS:
            tested = ", ".join(TESTED_VERSIONS)
            _logger.warning("eplb-plugin was tested with SGLang %s; this is %s", tested, _version())
        parse_algorithm(algorithm)
        if not server_args.enable_eplb:
            raise ConfigError(
                f"--eplb-algorithm {algorithm} does nothing without --enable-eplb; give both or neither"
            )
        elastic = getattr(server_args, "elastic_ep_backend", None)
        if elastic is not None:
            raise ConfigError(
                f"--eplb-algorithm {algorithm} cannot plan around failed ranks: "
                f"--elastic-ep-backend {elastic} needs an algorithm of SGLang's"
            )
    previous(server_args)


def _check_hooks(algorithm: str) -> None:
    missing = missing_hooks()
    if missing:
        raise ConfigError(
            f"--eplb-algorithm {algorithm}: this SGLang ({_version()}, tested: {', '.join(TESTED_VERSIONS)}) "
            f"lacks what eplb-plugin hooks into: {'; '.join(missing)}"
        )


def _version() -> str:
    from sglang.version import __version__

    return str(__version__)


def _compute_algorithm(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Our name, options and all, becomes the object that `_rebalance_experts` knows."""
    algorithm = _arguments(original, args, kwargs)["raw_algorithm"]
    return _balancer(algorithm) if is_ours(algorithm) else original(*args, **kwargs)


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
    current = _map_in_force()
    maps = (
        balancer.place_at_start(counts, topology)
        if current is None
        else balancer.rebalance(counts, topology, current.physical_to_logical_map_cpu)
    )
    return _as_sglang(maps)


def _start(original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """When SGLang's manager is made, which is when the model loads, get the planner ready."""
    original(*args, **kwargs)
    algorithm = _algorithm_in_use()
    if is_ours(algorithm):
        _check_hooks(algorithm)
        current = _map_in_force()
        _balancer(algorithm).start(current.physical_to_logical_map, current.num_logical_experts)
        watch(args[0], _balancer(algorithm))
        _balancer(algorithm).before_first = partial(warn_unmoved, args[0])


def _in_time_order(original: Callable[..., torch.Tensor], buffer: Any) -> torch.Tensor:
    """SGLang's ring of steps from the oldest on; it goes round by the steps that chunks of layers take."""
    steps = original(buffer)
    # Rolling copies the whole ring; without chunks of layers it is full, and in order, when it is asked for.
    in_order = buffer._curr_index == 0 or not is_ours(_algorithm_in_use())
    return steps if in_order else steps.roll(-buffer._curr_index, 0)


def _algorithm_in_use() -> str:
    """The algorithm of this process's server; one that never rebalances has none."""
    from sglang.srt.runtime_context import get_exec

    moe = get_exec().moe
    return str(moe.eplb_algorithm) if moe.enable_eplb else ""


def _map_in_force() -> Any:
    """SGLang's ExpertLocationMetadata, or None while the model has no placement yet."""
    from sglang.srt.eplb.expert_location import get_global_expert_location_metadata

    return get_global_expert_location_metadata()


def _arguments(function: Callable[..., Any], args: Any, kwargs: Any) -> dict[str, Any]:
    return inspect.signature(function).bind(*args, **kwargs).arguments


def _as_sglang(maps: SglangMaps) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return maps.physical_to_logical, maps.logical_to_physical, maps.replica_count
