"""The balancer's own process groups: the engine's stay undisturbed, and every wait has a limit."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from ..config.options import RebalancerOptions
from ..core.errors import EplbError, TransferError
from .control.rank_group import AnyGroup, RankGroup, answered
from .control.throttle import lower_priority
from .control.two_phase_commit import Store, TwoPhaseCommit
from .weights.transport import Transport, join_nccl

__all__ = ["Connections", "connect"]


@dataclass(frozen=True, eq=False)
class Connections:
    """What the ranks of one expert-parallel group communicate over.

    Attributes:
        control: small messages on the CPU, over gloo.
        transport: expert weights: over gloo on the CPU, over NCCL on CUDA devices.
        two_phase_commit: over `control` and a key-value store.
    """

    control: RankGroup
    transport: Transport
    two_phase_commit: TwoPhaseCommit

    def close(self) -> None:
        """Close all of them; ranks that still expect an answer get an error."""
        self.control.group = None
        self.transport.close()
        self.two_phase_commit.decisions.close()


def connect(
    group: RankGroup,
    options: RebalancerOptions,
    store: Store | None,
    *,
    with_weights: bool,
    error: EplbError | None,
) -> Connections:
    """All ranks of the group: connect.

    Args:
        group: of the engine; used once, to tell who takes part.
        options: give the limit of any communication. If weights move beside serving, their threads get a
            lower priority.
        store: where the new groups meet and decisions are kept; None is the store of the default group.
        with_weights: whether weights move at all.
        error: why this rank cannot take part.

    Raises:
        RankLostError: a rank did not join. TransferError: weights are on a device of another kind.
        AgreementError: ranks differ in `with_weights`. `error` on this rank, and EplbError on the others.
    """
    time_limit = options.time_limit
    alone = RankGroup(device="cpu", alone=True)
    if group.size == 1:
        if error is not None:
            raise error
        return Connections(alone, Transport(group), TwoPhaseCommit(alone, None, time_limit))
    if group.device.type not in ("cpu", "cuda"):
        raise TransferError(f"weights on {group.device} cannot be moved, only those on CPU and CUDA devices")
    open_store = _meet(group, store, error)
    limit = timedelta(seconds=time_limit)

    def gloo(part: str) -> AnyGroup:
        return dist.ProcessGroupGloo(open_store(part), group.rank, group.size, limit)

    def nccl(part: str) -> AnyGroup:
        return join_nccl(open_store(part), group.rank, group.size, group.device, time_limit)

    control = RankGroup(answered("joining", lambda: gloo("control")), "cpu")
    two_phase_commit = TwoPhaseCommit(control, open_store("decisions"), time_limit)
    control.agree("whether there are weights to move", int(with_weights))
    if not with_weights:
        return Connections(control, Transport(alone), two_phase_commit)
    # The threads of a group inherit the priority of the thread that makes it.
    with ThreadPoolExecutor(1, initializer=lower_priority if options.mode != "sync" else None) as maker:
        if group.device.type == "cuda":
            upward, downward = answered("joining", maker.submit(nccl, "data").result), None
        else:
            upward, downward = (
                answered("joining", maker.submit(gloo, part).result) for part in ("up", "down")
            )
    transport = Transport(RankGroup(upward, group.device), downward, time_limit=time_limit)
    return Connections(control, transport, two_phase_commit)


def _meet(group: RankGroup, store: Store | None, error: EplbError | None) -> Callable[[str], Store]:
    """All ranks: wait for each other, and agree on a name; opens parts of the store under that name.

    Ranks may arrive minutes apart, after loading weights. The name is random, since an earlier balancer may
    have left keys in the same store.
    """
    mine = torch.tensor([secrets.randbits(62), int(error is not None)], device=group.device)
    votes = group.all_gather(mine).tolist()
    if error is not None:
        raise error
    unable = [rank for rank, (_, failed) in enumerate(votes) if failed]
    if unable:
        raise EplbError(f"ranks {unable} cannot take part; what is wrong is said there")
    name = votes[0][0]
    if store is None:
        store = dist.distributed_c10d._get_default_store()
    # Calls on one store object wait for each other, and the engine may be using this one.
    store = store.clone() if hasattr(store, "clone") else store
    return lambda part: dist.PrefixStore(f"eplb_plugin/{name:x}/{part}", store)  # type: ignore[attr-defined]
