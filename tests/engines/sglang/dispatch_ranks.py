"""Dispatch `balanced` on the ranks of a gloo group: SGLang's own routers, recorder and rebalances.

Imported in the process that all ranks are forked from, so that SGLang is imported once.
"""

from __future__ import annotations

from types import SimpleNamespace

import sglang.srt.layers.moe.topk as sglang_topk
import sglang.srt.layers.moe.utils as sglang_utils
import sglang.srt.model_executor.model_runner as sglang_runner
import sglang.srt.utils
import torch
import torch.distributed as dist
from sglang.srt.distributed.parallel_state import init_model_parallel_group
from sglang.srt.layers.moe.utils import MoeA2ABackend
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from sglang.srt.runtime_context import get_flags, get_parallel

import eplb_plugin as eplb
from eplb_plugin.core.balancedness import balancedness_of_peaks
from eplb_plugin.integration.sglang import dispatch_seams
from eplb_plugin.integration.sglang import plugin as sglang_plugin
from eplb_plugin.integration.sglang.dispatch import to_slots
from eplb_plugin.integration.sglang.policy import fold_busy_steps
from tests.engines.sglang.eplb_ranks import DENSE_LAYERS, TOP_K, Server
from tests.engines.sglang.setups import Setup, Split, Static

MODEL = SimpleNamespace(hf_config=SimpleNamespace(architectures=["Qwen3MoeForCausalLM"]))


class SplittingServer(Server):
    """A server whose tokens come from SGLang's routers. Batches have padding; ranks may be without tokens."""

    def __init__(self, rank: int, setup: Setup) -> None:
        ranks = list(range(dist.get_world_size()))
        self.group = init_model_parallel_group(
            [ranks], rank, "gloo", use_pynccl=False, use_custom_allreduce=False, group_name=f"ep{rank}"
        )
        # The branch for NVIDIA GPUs, on a CPU. What SGLang compiles there is traced, and run by torch.
        sglang_topk._is_cuda, sglang.srt.utils.is_cuda = True, lambda: True
        mapped = sglang_topk._biased_grouped_topk_postprocess._torchdynamo_orig_callable
        sglang_topk._biased_grouped_topk_postprocess = torch.compile(
            mapped, dynamic=True, fullgraph=True, backend="aot_eager"
        )
        get_flags().moe.a2a_backend = MoeA2ABackend(setup.backend)
        self.rank, self.split = rank, Split([])
        super().__init__(rank, setup)
        self.routers = [
            sglang_topk.TopK(TOP_K, layer_id=layer, is_draft=False) for layer in range(setup.layers)
        ]
        # Garbage in the padding, of each rank its own.
        self.noise = torch.Generator().manual_seed(100 + rank)

    def before_manager(self) -> None:
        """What SGLang's model runner does between the map and the manager."""
        get_parallel().override_permanently(moe_ep_group=self.group, tp_group=self.group)
        if self.setup.backend != "none" and self.setup.dispatch == "lp":
            sglang_runner.init_lplb_solvers(model_config=MODEL)

    def route(self, step: int, logical_ids: torch.Tensor) -> torch.Tensor:
        """The slots of the tokens, [layers, tokens, top_k], through SGLang; -1 in the dense layers."""
        tokens = logical_ids.shape[1]
        chosen = torch.full_like(logical_ids, -1)
        padding = torch.randn(step % 4, self.setup.logical, generator=self.noise)
        bound = torch.tensor(tokens, dtype=torch.int32)
        for layer in range(DENSE_LAYERS, self.setup.layers):
            router = self.routers[layer]
            with (
                self.recorder.with_current_layer(layer),
                forward_context(ForwardContext(None, lambda: bound)),
            ):
                if tokens == 0 and not len(padding):
                    router.empty_topk_output(torch.device("cpu"))
                    continue
                logits = torch.zeros(tokens, self.setup.logical)
                logits.scatter_(1, logical_ids[layer], torch.tensor([2.0, 1.0]).expand(tokens, -1))
                logits = torch.cat([logits, padding])
                answer = router.forward_native(logits, logits)
                assert (answer.topk_ids[tokens:] == -1).all()
                chosen[layer] = answer.topk_ids[:tokens]
        return chosen

    def step(self) -> tuple[int, int]:
        number, ids = len(self.steps), next(self.traffic)
        # A router chooses distinct experts.
        ids[..., 1] = torch.where(
            ids[..., 0] == ids[..., 1], (ids[..., 0] + 5) % self.setup.logical, ids[..., 1]
        )
        sharded = self.setup.backend != "none"
        if sharded:
            # Ranks have tokens of their own, now and then none.
            ids = ids[:, : 0 if (number + self.rank) % 3 == 0 else ids.shape[1] - self.rank]
        placed = self.metadata.physical_to_logical_map_cpu.clone()
        with self.recorder.with_forward_pass(number, None):
            slots = self.route(number, ids)
        expert = placed[DENSE_LAYERS:, None].expand(-1, ids.shape[1], -1).gather(2, slots[DENSE_LAYERS:])
        self.split.wrong_tokens += int((expert != ids[DENSE_LAYERS:]).sum())
        self.split.tokens += ids.shape[1]
        counts, taken = _count(ids, self.setup.logical), _count(slots, placed.shape[1])
        counts[:DENSE_LAYERS] = 0
        self.steps.append(counts.clone())
        if sharded:
            dist.all_reduce(counts)
            dist.all_reduce(taken)
        placement = eplb.Placement(placed, self.setup.logical)
        topology = eplb.Topology(num_ranks=dist.get_world_size(), num_slots=placed.shape[1])
        expected = eplb.balance_batch(counts, placement, topology, expert_cost=2)
        self.split.wrong_slots += int((taken != expected).sum())
        self.split.chosen.append(slots.tolist())
        self.manager.on_forward_pass_end()
        return self.model.wrong_rows(self.metadata)


class StaticServer(SplittingServer):
    """A server with dispatch `static`: ranks have the same tokens and send them to other slots."""

    def __init__(self, rank: int, setup: Setup) -> None:
        self.result = Static([], [], [])
        self.slots: list[torch.Tensor] = []
        super().__init__(rank, setup)

    def step(self) -> tuple[int, int]:
        ids = next(self.traffic)
        ids[..., 1] = torch.where(
            ids[..., 0] == ids[..., 1], (ids[..., 0] + 5) % self.setup.logical, ids[..., 1]
        )
        placed = self.metadata.physical_to_logical_map_cpu.clone()
        with self.recorder.with_forward_pass(len(self.steps), None):
            slots = self.route(len(self.steps), ids)
        experts = ids[DENSE_LAYERS:]
        expert = placed[DENSE_LAYERS:, None].expand(-1, ids.shape[1], -1).gather(2, slots[DENSE_LAYERS:])
        self.result.wrong_tokens += int((expert != experts).sum())
        per_rank = placed.shape[1] // dist.get_world_size()
        here = placed[DENSE_LAYERS:, self.rank * per_rank :][:, :per_rank]
        has = (experts.unsqueeze(3) == here[:, None, None]).any(3)
        own = slots[DENSE_LAYERS:] // per_rank == self.rank
        self.result.near += int((has & own).sum())
        self.result.far += int((has & ~own).sum())
        counts, taken = _count(ids, self.setup.logical), _count(slots, placed.shape[1])
        counts[:DENSE_LAYERS] = 0
        dist.all_reduce(counts)
        dist.all_reduce(taken)
        self.steps.append(counts)
        self.slots.append(taken)
        self.placed = placed
        self.manager.on_forward_pass_end()
        return self.model.wrong_rows(self.metadata)


def static(rank: int, setup: Setup) -> Static:
    """Serve until `setup.rebalances` rebalances are done, and compare each report with what was counted."""
    server, topology = (
        StaticServer(rank, setup),
        eplb.Topology(num_ranks=dist.get_world_size(), num_slots=setup.logical + setup.redundant),
    )
    planner, result = sglang_plugin.balancer_of(setup.algorithm).planner, server.result
    while len(planner.reports) < setup.rebalances:
        seen = len(planner.reports)
        while len(planner.reports) == seen:
            assert server.step()[0] == 0
        placement = eplb.Placement(server.placed, setup.logical)
        passes, slots = (torch.stack(steps[-setup.interval :]) for steps in (server.steps, server.slots))
        loads = topology.by_rank(fold_busy_steps(slots, 32).double(), 0.0).sum(3)
        result.counted.append(balancedness_of_peaks(loads.mean(2), loads.amax(2)))
        result.even.append(eplb.balancedness(fold_busy_steps(passes, 32), placement, topology))
    assert bool(planner._tables) == (planner.static == "fair")
    result.table = planner.static
    result.reported = [report.balancedness_before for report in planner.reports]
    result.moves = sum(report.moves for report in planner.reports)
    result.failures = planner.failures
    return result


def _count(ids: torch.Tensor, most: int) -> torch.Tensor:
    """int64 [layers, most]: how often each id is in [layers, tokens, top_k]."""
    return torch.stack([torch.bincount(row[row >= 0], minlength=most) for row in ids.flatten(1)])


def split(rank: int, setup: Setup, costs: tuple[int, ...]) -> Split:
    """Serve until `setup.rebalances` rebalances are done. `costs`: of `expert_cost: auto`, on each rank."""
    asked = []

    def resolve(option: object, tensors: list[torch.Tensor], device: torch.device) -> int:
        asked.append((option, [tuple(tensor.shape) for tensor in tensors], device.type))
        return costs[rank]

    dispatch_seams.resolve_expert_cost = resolve
    server = SplittingServer(rank, setup)
    planner = sglang_plugin.balancer_of(setup.algorithm).planner
    while len(planner.reports) < setup.rebalances:
        wrong, _ = server.step()
        server.split.wrong_rows += wrong
    slots = (setup.logical + setup.redundant) // dist.get_world_size()
    assert asked == [("auto", [(slots, 3, 2), (slots, 5), (slots,)], "cpu")]
    assert sglang_topk.topk_ids_logical_to_physical is to_slots
    server.split.moves = sum(report.moves for report in planner.reports)
    server.split.failures = planner.failures
    return server.split


def start(rank: int, setup: Setup, broken: str) -> None:
    """Start as far as the model, with one thing otherwise than it should be."""
    if broken == "allgather":
        sglang_utils.is_moe_input_scattered_across_dp_ranks = lambda: True
    else:
        sglang_runner.init_lplb_solvers = lambda model_config: None
    SplittingServer(rank, setup)
