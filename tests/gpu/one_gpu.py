"""Several ranks on one GPU, over NCCL."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist


def share_the_gpu(rank: int) -> torch.device:
    """Called by each rank before NCCL is used. NCCL refuses ranks of one host that share a GPU, so each gets
    a host of its own, and they talk over the loopback."""
    os.environ.update(
        NCCL_HOSTID=f"host-of-rank-{rank}",
        NCCL_SOCKET_IFNAME="lo",
        NCCL_IB_DISABLE="1",
        NCCL_P2P_DISABLE="1",
        NCCL_SHM_DISABLE="1",
    )
    torch.cuda.set_device(0)
    return torch.device("cuda", 0)


def nccl_group() -> dist.ProcessGroup:
    """A group of all ranks as an engine has one."""
    return dist.new_group(backend="nccl")
