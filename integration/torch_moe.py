"""A small expert-parallel MoE language model in plain PyTorch, balanced by `Rebalancer`.

The structure is real, the size is a toy. The demo serves it, and other engines can copy from it: an engine
calls the rebalancer in five places, marked (1) to (5) below.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import Field

from eplb_plugin.config.options import Options, PlannerOptions, RebalancerOptions
from eplb_plugin.core.placement import Placement
from eplb_plugin.core.topology import Topology
from eplb_plugin.runtime.rebalancer import Rebalancer, RebalanceReport

__all__ = ["MoEConfig", "MoEModel", "expert_tensors"]


class MoEConfig(Options):
    """Shape and seed of the model."""

    vocab: int = Field(1024, ge=1)
    """Token ids; id `t` belongs to topic `t % num_topics`."""
    num_topics: int = Field(8, ge=1)
    """Clusters of token embeddings. Tokens of one topic tend to choose the same experts."""
    topic_strength: float = Field(2.0, ge=0)
    """Distance between topics, in standard deviations of the tokens within a topic."""
    hidden: int = Field(64, ge=1)
    """Size of the residual stream."""
    expert_hidden: int = Field(128, ge=1)
    """Inner size of each expert."""
    num_layers: int = Field(4, ge=1)
    """MoE layers."""
    num_logical: int = Field(32, ge=1)
    """Logical experts per layer."""
    top_k: int = Field(4, ge=1)
    """Experts per token."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of all weights."""


def expert_tensors(config: MoEConfig, layer: int, expert: int) -> list[torch.Tensor]:
    """The weights of one logical expert: a function of (seed, layer, expert), the same on every rank.

    Returns:
        gate [expert_hidden, hidden], up [expert_hidden, hidden], down [hidden, expert_hidden], scale [].
    """
    generator = _generator(config, 1 + layer * config.num_logical + expert)
    h, f = config.hidden, config.expert_hidden
    gate, up = (torch.randn(f, h, generator=generator) * h**-0.5 for _ in range(2))
    down = torch.randn(h, f, generator=generator) * f**-0.5
    return [gate, up, down, torch.rand((), generator=generator) + 0.5]


class MoEModel:
    """One rank's part of the model. All ranks must construct it, call `forward` and call `step` together.

    Args:
        topology: ranks and slots. None: one rank with one slot for each expert, the reference for tests.
        placement: initial placement; by default `Placement.default`.
        group: process group; None is the default group, or none for a topology of one rank.
        device: device of weights, token ids and logits.
    """

    def __init__(
        self,
        config: MoEConfig,
        topology: Topology | None = None,
        *,
        placement: Placement | None = None,
        options: RebalancerOptions | None = None,
        planner: PlannerOptions | None = None,
        group: dist.ProcessGroup | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config = config
        self.topology = topology or Topology(num_ranks=1, num_slots=config.num_logical)
        self.group = group
        h, logical = config.hidden, config.num_logical
        generator = _generator(config, 0)
        topics = torch.randn(config.num_topics, h, generator=generator) * config.topic_strength
        noise = torch.randn(config.vocab, h, generator=generator)
        self.embedding = (topics[torch.arange(config.vocab) % config.num_topics] + noise).to(device)
        self.routers = [
            (torch.randn(logical, h, generator=generator) * h**-0.5).to(device)
            for _ in range(config.num_layers)
        ]
        self.head = (torch.randn(config.vocab, h, generator=generator) * h**-0.5).to(device)

        # (1) Load the experts of this rank's slots, and register all tensors of an expert.
        rank = dist.get_rank(group) if self.topology.num_ranks > 1 else 0
        start = placement or Placement.default(config.num_layers, logical, self.topology.num_slots)
        here = start.physical_to_logical[:, self.topology.slots_of_rank(rank)].tolist()
        self.experts = [
            _stack([expert_tensors(config, layer, expert) for expert in experts], device)
            for layer, experts in enumerate(here)
        ]
        self.rebalancer = Rebalancer(
            self.topology,
            config.num_layers,
            logical,
            weights=self.experts,
            placement=start,
            options=options,
            planner=planner,
            group=group,
        )

    @torch.inference_mode()
    def forward(self, tokens: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
        """Compute the logits of this rank's tokens. Ranks may have different numbers of tokens, 0 or more.

        Args:
            tokens: int64 [tokens], token ids.
            valid: bool [tokens], False for padding; None: no padding.

        Returns:
            float32 [tokens, vocab].
        """
        x = self.embedding[tokens]
        for layer in range(self.config.num_layers):
            x = x + self._moe(layer, _norm(x), valid)
        return F.linear(_norm(x), self.head)

    def step(self, is_dummy: bool = False) -> RebalanceReport | None:
        """(5) End a forward step. Returns a report after a rebalance; `is_dummy`: a step without work."""
        return self.rebalancer.step(is_dummy)

    def wrong_slots(self) -> int:
        """Number of this rank's slots whose weights are not bit-identical to those of the placement."""
        slots = self.topology.slots_of_rank(self.rebalancer.rank)
        wrong = 0
        for layer, experts in enumerate(self.rebalancer.placement.physical_to_logical[:, slots].tolist()):
            for slot, expert in enumerate(experts):
                made = expert_tensors(self.config, layer, expert)
                held = [tensor[slot].cpu() for tensor in self.experts[layer]]
                wrong += not all(torch.equal(a, b) for a, b in zip(made, held, strict=True))
        return wrong

    def _moe(self, layer: int, x: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
        """One MoE layer: [tokens, hidden] to [tokens, hidden]."""
        top_k = self.config.top_k
        weight, expert_ids = F.linear(x, self.routers[layer]).softmax(-1).topk(top_k)
        weight = weight / weight.sum(-1, keepdim=True)

        # (2) Record the choices of the router, as logical experts.
        self.rebalancer.record(layer, expert_ids, valid)
        # (3) Dispatch: get the replica of each token.
        chosen, received = self.rebalancer.physical_and_received(layer, expert_ids)
        slots = chosen.flatten()

        # Rows sorted by slot are sorted by rank too.
        slots, order = slots.sort(stable=True)
        rows = x[order // top_k]
        sent = torch.bincount(slots, minlength=self.topology.num_slots)
        slots_by_rank, num_ranks = list(self.topology.slots_by_rank), self.topology.num_ranks
        here = slots_by_rank[self.rebalancer.rank]
        if received is None:
            received = self._exchange(sent, slots_by_rank, [here] * num_ranks).view(num_ranks, here)
        to_rank = [int(part.sum()) for part in sent.split(slots_by_rank)]
        from_rank = received.sum(1).tolist()
        rows = self._exchange(rows, to_rank, from_rank)

        # Rows arrive sorted by source rank, then slot; the experts need them by slot.
        each = torch.arange(received.shape[1], device=x.device).repeat(received.shape[0])
        slot = each.repeat_interleave(received.flatten())
        by_slot = slot.argsort(stable=True)
        out = torch.empty_like(rows)
        out[by_slot] = self._run_experts(layer, rows[by_slot], received.sum(0).tolist())

        # Combine: send the rows back to their source ranks, then sum with weights.
        back = self._exchange(out, from_rank, to_rank)
        result = torch.empty_like(back)
        result[order] = back
        return (result.view(-1, top_k, x.shape[1]) * weight.unsqueeze(-1)).sum(1)

    def _run_experts(self, layer: int, rows: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """SwiGLU of each slot's expert; `rows` are sorted by slot, `counts[i]` of them for slot `i`."""
        # (4) Nothing to do: a rebalance writes new weights into these tensors.
        gate, up, down, scale = self.experts[layer]
        outs = [
            F.linear(F.silu(F.linear(x, gate[i])) * F.linear(x, up[i]), down[i]) * scale[i]
            for i, x in enumerate(torch.split(rows, counts))
        ]
        return torch.cat(outs)

    def _exchange(self, rows: torch.Tensor, to_rank: list[int], from_rank: list[int]) -> torch.Tensor:
        """All-to-all of rows sorted by rank, given the row counts to and from each rank."""
        if self.topology.num_ranks == 1:
            return rows
        received = rows.new_empty(sum(from_rank), *rows.shape[1:])
        dist.all_to_all_single(received, rows, from_rank, to_rank, group=self.group)
        return received


def _norm(x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, x.shape[-1:])


def _stack(experts: list[list[torch.Tensor]], device: torch.device | str) -> list[torch.Tensor]:
    """Stack each tensor of the experts: [slots on this rank, ...]."""
    return [torch.stack(parts).to(device) for parts in zip(*experts, strict=True)]


def _generator(config: MoEConfig, stream: int) -> torch.Generator:
    # The factor keeps the streams of neighbouring seeds disjoint.
    return torch.Generator().manual_seed(config.seed * 1_000_003 + stream)
