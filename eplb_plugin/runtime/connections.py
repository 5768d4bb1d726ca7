"""Process groups of the balancer's own: they do not disturb the engine's, and wait no longer than a limit."""

from __future__ import annotations

import secrets
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import torch
import torch.distributed as dist

from ..core.errors import EplbError, TransferError
from .control.priority import give_way
from .control.rank_group import AnyGroup, RankGroup, answered
from .control.two_phase_commit import Decisions, Store
from .weights.transport import Transport, join_nccl

__all__ = ["Channels", "Store"]


class Channels:
    """What one expert-parallel group talks over. All its ranks make it together.

    Args:
        group: the engine's group; it says who takes part, and is used once, here.
        time_limit: seconds that any communication may take.
        with_weights: whether any weights move over them.
        in_background: weights move while the model serves, and should not take cores from it.
        store: where the groups meet and decisions are left; None is the store of the default group.
        error: why this rank cannot take part.

    Attributes:
        control: small messages on the CPU, over gloo.
        data: expert weights: over gloo on the CPU, over NCCL on CUDA devices.
        decisions: the last word on every commit.

    Raises:
        RankLostError: a rank did not join. TransferError: weights are on a device of another kind.
        AgreementError: ranks differ in whether there are weights. `error` there, and EplbError on the others.
    """

    def __init__(
        self,
        group: RankGroup,
        time_limit: float,
        store: Store | None = None,
        *,
        with_weights: bool = True,
        in_background: bool = False,
        error: EplbError | None = None,
    ) -> None:
        self.control = group
        self.data = Transport(group)
        self.decisions = Decisions(None, time_limit)
        if group.size == 1:
            if error is not None:
                raise error
            self.control = RankGroup(device="cpu", alone=True)
            return
        if group.device.type not in ("cpu", "cuda"):
            raise TransferError(
                f"weights on {group.device} cannot be moved, only those on CPU and CUDA devices"
            )
        # Ranks may arrive minutes apart, after loading weights; from here on they are together. The name is
        # new each time, since others may have left something in the same store.
        mine = torch.tensor([secrets.randbits(62), int(error is not None)], device=group.device)
        said = group.all_gather(mine).tolist()
        if error is not None:
            raise error
        if any(failed for _, failed in said):
            unable = [rank for rank, (_, failed) in enumerate(said) if failed]
            raise EplbError(f"ranks {unable} cannot take part; what is wrong is said there")
        name = said[0][0]
        if store is None:
            store = dist.distributed_c10d._get_default_store()
        # Calls on one store object wait for each other; the engine may be using this one.
        store = store.clone() if hasattr(store, "clone") else store
        limit = timedelta(seconds=time_limit)

        def prefixed(part: str) -> Store:
            return dist.PrefixStore(f"eplb_plugin/{name:x}/{part}", store)  # type: ignore[attr-defined]

        def gloo(part: str) -> AnyGroup:
            return dist.ProcessGroupGloo(prefixed(part), group.rank, group.size, limit)

        def nccl(part: str) -> AnyGroup:
            return join_nccl(prefixed(part), group.rank, group.size, group.device, time_limit)

        joined = answered("joining", lambda: gloo("control"))
        self.control = RankGroup(joined, "cpu")
        self.decisions = Decisions(prefixed("decisions"), time_limit)
        self.control.agree("whether there are weights to move", int(with_weights))
        if not with_weights:
            self.data = Transport(RankGroup(device="cpu", alone=True))
            return
        # A group's own threads get the priority of the thread that makes it.
        with ThreadPoolExecutor(1, initializer=give_way if in_background else None) as maker:
            if group.device.type == "cuda":
                upward, downward = answered("joining", maker.submit(nccl, "data").result), None
            else:
                upward, downward = (
                    answered("joining", maker.submit(gloo, part).result) for part in ("up", "down")
                )
        self.data = Transport(RankGroup(upward, group.device), downward, time_limit=time_limit)

    def close(self) -> None:
        """Give the groups back; ranks that still expect an answer get an error."""
        self.control.group = None
        self.data.close()
        self.decisions.close()
