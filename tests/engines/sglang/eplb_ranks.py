"""SGLang's own recorder, manager and updater on the ranks of a gloo group, around a stand-in for the model.

Imported in the process that all ranks are forked from, so that SGLang is imported once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from types import SimpleNamespace

import sglang.srt.eplb.expert_distribution as sglang_distribution
import torch
import torch.distributed as dist
from sglang.srt.eplb.eplb_manager import EPLBManager
from sglang.srt.eplb.expert_location import (
    ExpertLocationMetadata,
    ModelConfigForExpertLocation,
    set_global_expert_location_metadata,
)
from sglang.srt.eplb.expert_location_updater import ExpertLocationUpdater
from sglang.srt.plugins import load_plugins
from sglang.srt.runtime_context import get_context, get_parallel

from eplb_plugin.integration.sglang import plugin as sglang_plugin
from eplb_plugin.integration.sglang import policy as sglang_balancer
from tests.engines.sglang.setups import Outcome, Setup

DENSE_LAYERS = 1
TOP_K = 2
TOKENS = 96


class StandIn(torch.nn.Module):
    """Has what the manager asks of a model: the weights of its MoE layers, each expert's of one value."""

    def __init__(self, rank: int, metadata: ExpertLocationMetadata) -> None:
        super().__init__()
        self.slots = slice(
            rank * metadata.num_local_physical_experts, (rank + 1) * metadata.num_local_physical_experts
        )
        self.routed_experts_weights_of_layer = {
            layer: [self._rows(layer, part, metadata) for part in range(3)]
            for layer in range(DENSE_LAYERS, metadata.num_layers)
        }

    def _rows(self, layer: int, part: int, metadata: ExpertLocationMetadata) -> torch.Tensor:
        """What the map in force says that this rank's slots hold: [slots on this rank, ...]."""
        experts = metadata.physical_to_logical_map_cpu[layer, self.slots]
        shape, dtype = (((3, 2), torch.float32), ((5,), torch.bfloat16), ((), torch.int64))[part]
        values = experts + 16 * (layer + part)  # exact in each of the types
        return values.view(-1, *[1] * len(shape)).expand(-1, *shape).to(dtype).clone()

    def wrong_rows(self, metadata: ExpertLocationMetadata) -> tuple[int, int]:
        """How many weight rows are not what the map in force says, and how many there are."""
        wrong = total = 0
        for layer, tensors in self.routed_experts_weights_of_layer.items():
            for part, tensor in enumerate(tensors):
                same = tensor == self._rows(layer, part, metadata)
                differs = ~same.view(same.shape[0], -1).all(1)
                wrong, total = wrong + int(differs.sum()), total + differs.numel()
        return wrong, total


class Server:
    """One rank's parts of SGLang, made as its model runner makes them."""

    def __init__(self, rank: int, setup: Setup) -> None:
        load_plugins()
        _configure(rank, dist.get_world_size(), setup)
        self.setup = setup
        self.traffic = _traffic(rank if setup.own_tokens else 0, setup)
        if setup.recorded is None:
            self.metadata = ExpertLocationMetadata.init_trivial(None, rank)
        else:
            counts = torch.tensor(setup.recorded).expand(setup.layers, -1).clone()
            counts[:DENSE_LAYERS] = 0
            self.metadata = ExpertLocationMetadata.init_by_eplb(None, counts)
        set_global_expert_location_metadata(self.metadata)
        self.recorder = sglang_distribution.ExpertDistributionRecorder.init_new(self.metadata, rank)
        sglang_distribution.set_global_expert_distribution_recorder(self.recorder)
        self.model = StandIn(rank, self.metadata)
        self.before_manager()
        updater = ExpertLocationUpdater()
        self.manager = EPLBManager(
            model_config=None,
            get_model=lambda: self.model,
            get_expert_location_updater=lambda: updater,
            get_expert_backup_client=lambda: None,
            get_weight_updater=lambda: SimpleNamespace(update_weights_from_disk=None),
        )
        self.steps: list[torch.Tensor] = []

    def before_manager(self) -> None:
        """For what comes between the map and the manager."""

    def step(self) -> tuple[int, int]:
        """A forward pass, with a rebalance at its end when one is due; see `StandIn.wrong_rows`."""
        logical_ids = next(self.traffic)
        with self.recorder.with_forward_pass(len(self.steps), None):
            for layer in range(DENSE_LAYERS, self.setup.layers):
                with self.recorder.with_current_layer(layer):
                    self.recorder.on_select_experts(_replica(self.metadata, layer, logical_ids[layer]))
        counts = [torch.bincount(ids.flatten(), minlength=self.setup.logical) for ids in logical_ids]
        counts[:DENSE_LAYERS] = [torch.zeros_like(counts[0])] * DENSE_LAYERS
        self.steps.append(torch.stack(counts))
        self.manager.on_forward_pass_end()
        return self.model.wrong_rows(self.metadata)


def serve(rank: int, setup: Setup) -> Outcome:
    """Run `setup.rebalances` rebalances on traffic that drifts, the last one to its end."""
    server = Server(rank, setup)
    metadata, planner = server.metadata, sglang_plugin.balancer_of(setup.algorithm).planner
    outcome = Outcome(metadata.physical_to_logical_map_cpu.tolist(), [], [], 0, 0, 0, False, [], [])
    observe, plan = planner.observe, planner.plan

    def observe_and_tell(load: torch.Tensor) -> None:
        outcome.recorded.extend(load.flatten(1).tolist())
        passes = torch.stack(server.steps[-setup.interval :])
        dist.all_reduce(passes)
        outcome.expected.extend(sglang_balancer.fold_busy_steps(passes, 16).flatten(1).tolist())
        observe(load)

    def plan_or_fail(*args: object) -> object:
        if rank == setup.failing_rank and len(planner.reports) == 1:
            raise RuntimeError("this planner fails on purpose")
        return plan(*args)

    planner.observe, planner.plan = observe_and_tell, plan_or_fail
    dense = metadata.physical_to_logical_map_cpu[:DENSE_LAYERS].clone()
    for _ in range(setup.rebalances):
        seen = len(planner.reports)
        # One interval, the chunks of its rebalance included, ends where the next plan is made.
        while len(planner.reports) == seen:
            before = metadata.physical_to_logical_map_cpu.tolist()
            wrong, total = server.step()
            outcome.wrong_rows += wrong
            outcome.checked_rows += total
        if seen:
            outcome.maps.append(before)
    outcome.reports = [dataclasses.asdict(report) for report in planner.reports]
    outcome.failures = planner.failures
    outcome.dense_row_changed = not torch.equal(dense, metadata.physical_to_logical_map_cpu[:DENSE_LAYERS])
    return outcome


def serve_with_their_algorithm(rank: int) -> tuple[int, bool]:
    """A rebalance by SGLang's own algorithm, the plugin being loaded: rows wrong, whether the map changed."""
    setup = Setup(algorithm="deepseek")
    server = Server(rank, setup)
    before = server.metadata.physical_to_logical_map_cpu.clone()
    wrong = [server.step()[0] for _ in range(2 * setup.interval)]
    assert sglang_plugin.balancer_of.cache_info().currsize == 0
    return sum(wrong), not torch.equal(before, server.metadata.physical_to_logical_map_cpu)


def _configure(rank: int, world: int, setup: Setup) -> None:
    """Publish the server arguments that these parts of SGLang read, as its own tests do."""
    torch.cpu.empty_cache = lambda: None
    sglang_distribution.get_device = lambda *args: "cpu"
    get_context().override_server_args(
        device="cpu",
        tp_size=world,
        ep_size=world,
        nnodes=setup.nodes,
        enable_eplb=True,
        eplb_algorithm=setup.algorithm,
        ep_num_redundant_experts=setup.redundant,
        eplb_rebalance_num_iterations=setup.interval,
        eplb_rebalance_layers_per_chunk=setup.layers_per_chunk,
        expert_distribution_recorder_mode="stat",
        expert_distribution_recorder_buffer_size=setup.interval,
        moe_a2a_backend=setup.backend,
        ep_dispatch_algorithm="dynamic" if setup.backend == "none" else setup.dispatch,
    ).install()
    get_parallel().override_permanently(tp_rank=rank, moe_ep_rank=rank)
    shape = ModelConfigForExpertLocation(setup.layers, setup.logical, setup.groups)
    ModelConfigForExpertLocation.from_model_config = staticmethod(lambda model_config: shape)


def _traffic(rank: int, setup: Setup) -> Iterator[torch.Tensor]:
    """Logical ids [layers, tokens, top_k] of each step on this rank; what is hot drifts."""
    generator = torch.Generator().manual_seed(rank)
    mixes = torch.randn(3, setup.layers, setup.logical, generator=torch.Generator().manual_seed(99)) * 1.5
    step = 0
    while True:
        phase = torch.tensor([step / 17, step / 23 + 2, step / 31 + 4]).sin()
        chances = (mixes * phase.view(3, 1, 1)).sum(0).exp()
        ids = torch.multinomial(chances, TOKENS, replacement=True, generator=generator)
        yield torch.stack([ids, (ids + 1 + step) % setup.logical], 2)
        step += 1


def _replica(metadata: ExpertLocationMetadata, layer: int, logical_ids: torch.Tensor) -> torch.Tensor:
    """Physical ids of the tokens' experts, their replicas in turn, as the dispatch chooses them."""
    valid = metadata.logical_to_all_physical_map_num_valid[layer][logical_ids]
    turn = torch.arange(logical_ids.numel()).view_as(logical_ids) % valid
    return metadata.logical_to_all_physical_map[layer][logical_ids, turn]
