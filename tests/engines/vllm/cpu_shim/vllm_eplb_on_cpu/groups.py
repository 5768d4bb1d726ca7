"""Collectives that data parallelism needs and that vLLM's CPU communicator lacks."""

import torch
import torch.distributed as dist


def with_uneven_collectives():
    """(5, 6) Gather and reduce-scatter of different numbers of rows per rank."""
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    CpuCommunicator.all_gatherv = all_gatherv
    CpuCommunicator.reduce_scatterv = reduce_scatterv


def all_gatherv(self, input_, dim=0, sizes=None):
    """The rows of all ranks in order; `sizes` rows from each."""
    assert dim == 0, dim
    if not isinstance(input_, torch.Tensor):
        return [all_gatherv(self, part, dim, sizes) for part in input_]
    sizes = sizes or [input_.shape[0]] * self.world_size
    # gloo gathers equal shapes only.
    padded = input_.new_zeros(max(sizes), *input_.shape[1:])
    padded[: input_.shape[0]] = input_
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=self.device_group)
    return torch.cat([part[:rows] for part, rows in zip(parts, sizes, strict=True)])


def reduce_scatterv(self, input_, dim=0, sizes=None):
    """This rank's rows of the sum over ranks; `sizes` rows for each."""
    assert dim in (0, -input_.dim()), dim
    total = input_.clone()
    dist.all_reduce(total, group=self.device_group)
    sizes = sizes or [input_.shape[0] // self.world_size] * self.world_size
    return total.split(sizes)[self.rank_in_group].clone()
