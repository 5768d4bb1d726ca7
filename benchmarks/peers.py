"""Other projects' policies, run from their unpacked wheels with small stand-ins for the engines around them.

`make bench-peers` fetches the wheels into `.peers/`; nothing of theirs is part of this project.
"""

from __future__ import annotations

import importlib
import logging
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from eplb_plugin import Placement, Topology

PEERS = Path(__file__).resolve().parent.parent / ".peers" / "src"


def available() -> bool:
    """Whether the wheels were fetched."""
    return PEERS.is_dir()


def vllm_default(window: torch.Tensor, topology: Topology, current: Placement | None) -> Placement:
    """vLLM's default policy: from one summed load, keeping slots within a rank."""
    with _stand_ins(topology):
        policy = importlib.import_module("vllm.distributed.eplb.policy.default").DefaultEplbPolicy
        ids = policy.rebalance_experts(
            window.sum(0) if window.dim() == 3 else window,
            topology.num_slots,
            topology.num_groups,
            topology.num_nodes,
            topology.num_ranks,
            None if current is None else current.physical_to_logical,
        )
    return Placement(ids, window.shape[-1])


class FlashLB:
    """vllm-ascend's FlashLB: it keeps a window of its own and updates the layers that it finds worth it."""

    def __init__(self) -> None:
        self._policy: object | None = None
        self._snapshots = 0

    def __call__(self, window: torch.Tensor, topology: Topology, current: Placement | None) -> Placement:
        assert current is not None
        with _stand_ins(topology):
            module = importlib.import_module("vllm_ascend.eplb.core.policy.policy_flashlb")
            # Its buffer has the length of the first window that it sees.
            if self._policy is None or self._snapshots != window.shape[0]:
                self._policy, self._snapshots = module.FlashLB(), window.shape[0]
            table, workload = _per_slot(window, topology, current)
            _, layers, deployment = self._policy.rebalance_experts(table, workload)
        ids = current.physical_to_logical.clone()
        for layer in layers:
            ids[layer] = torch.as_tensor(np.asarray(deployment[layer])).flatten()
        return Placement(ids, current.num_logical)


class SwiftBalancer:
    """vllm-ascend's SwiftBalancer: at most one exchange per pair of ranks."""

    def __call__(self, window: torch.Tensor, topology: Topology, current: Placement | None) -> Placement:
        assert current is not None
        with _stand_ins(topology):
            module = importlib.import_module("vllm_ascend.eplb.core.policy.policy_swift_balancer")
            table, workload = _per_slot(window.sum(0, keepdim=True), topology, current)
            _, _, deployment = module.SwiftBalanceEplb().rebalance_experts(table, workload[0])
        return Placement(torch.as_tensor(np.asarray(deployment)).flatten(1), current.num_logical)


def _per_slot(
    window: torch.Tensor, topology: Topology, current: Placement
) -> tuple[torch.Tensor, torch.Tensor]:
    """Placement [layers, ranks, slots of a rank] and load [snapshots, layers, ranks, slots of a rank]."""
    share = window / current.replica_count
    ids = current.physical_to_logical
    load = share.gather(2, ids.expand(window.shape[0], -1, -1)).round().to(torch.int64)
    shape = (topology.num_ranks, topology.slots_per_rank)
    return ids.unflatten(1, shape), load.unflatten(2, shape)


@contextmanager
def _stand_ins(topology: Topology) -> Iterator[None]:
    """Modules with the few names that the policies import from their engines, for the time of a call."""

    def module(name: str, path: bool = False, **names: object) -> types.ModuleType:
        made = types.ModuleType(name)
        made.__dict__.update(names)
        if path:
            made.__path__ = [str(PEERS / name.replace(".", "/"))]
        return made

    group = types.SimpleNamespace(world_size=topology.num_ranks)
    wanted = [
        *(module(name, path=True) for name in ("vllm", "vllm.distributed", "vllm.distributed.eplb")),
        module("vllm.distributed.eplb.policy", path=True),
        module("vllm.logger", logger=logging.getLogger("peers")),
        *(module(name, path=True) for name in ("vllm_ascend", "vllm_ascend.eplb", "vllm_ascend.eplb.core")),
        module("vllm_ascend.eplb.core.policy", path=True),
        module("vllm_ascend.distributed"),
        module("vllm_ascend.distributed.parallel_state", get_dynamic_eplb_group=lambda: group),
        module("torch_npu"),
    ]
    added = [made.__name__ for made in wanted if made.__name__ not in sys.modules]
    for made in wanted:
        sys.modules.setdefault(made.__name__, made)
    sys.modules["vllm_ascend.distributed.parallel_state"].get_dynamic_eplb_group = lambda: group
    had_npu = hasattr(torch, "npu")
    if not had_npu:
        torch.npu = types.SimpleNamespace(device_count=lambda: topology.ranks_per_node)
    try:
        yield
    finally:
        if not had_npu:
            del torch.npu
        for name in added:
            sys.modules.pop(name, None)
