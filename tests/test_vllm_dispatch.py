"""The mapping in place of vLLM's, without vLLM: tokens go where `balance_batch` says, and count there."""

from __future__ import annotations

import logging
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import eplb_plugin as eplb
from eplb_plugin.dispatch.batch_split import BatchSplit
from eplb_plugin.integration.common.options import EngineOptions
from eplb_plugin.integration.vllm import dispatch
from eplb_plugin.integration.vllm.dispatch import (
    BalancedMapping,
    bind_dispatch,
    restore_mapping,
    token_layout,
)
from tests.runtime.cases import random_placement

from .processes import run_ranks

LOGICAL, SLOTS, RANKS, WIDTH = 7, 12, 2, 1024
TOPOLOGY = eplb.Topology(num_ranks=RANKS, num_slots=SLOTS)
BALANCED = EngineOptions(dispatch="balanced")


def vllms_own(
    topk_ids,
    expert_load_view,
    logical_to_physical_map,
    logical_replica_count,
    record_enabled,
    num_unpadded_tokens=None,
):
    """What vLLM's kernel does, one id after the other."""
    mapped = torch.full_like(topk_ids, -1)
    limit = len(topk_ids) if num_unpadded_tokens is None else int(num_unpadded_tokens)
    for token, experts in enumerate(topk_ids.tolist()):
        for place, expert in enumerate(experts):
            if 0 <= expert < len(logical_replica_count):
                replica = (token * 2654435769 % 2**32) % int(logical_replica_count[expert])
                slot = int(logical_to_physical_map[expert, replica])
                mapped[token, place] = slot
                if token < limit and bool(record_enabled):
                    expert_load_view[slot] += 1
    return mapped


def tables(seed: int = 0) -> tuple[eplb.Placement, torch.Tensor, torch.Tensor]:
    """A placement of one layer, and vLLM's two tables of it."""
    placement = random_placement(1, LOGICAL, SLOTS, seed)
    narrow = placement.logical_to_physical[0]
    wide = torch.full((LOGICAL, WIDTH), -1)
    wide[:, : narrow.shape[1]] = narrow
    return placement, wide, placement.replica_count[0].clone()


def skewed_ids(seed: int, tokens: int, top_k: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(tokens, top_k, generator=generator) ** 2 * LOGICAL).long()


def counts_of(ids: torch.Tensor) -> torch.Tensor:
    return torch.bincount(ids.flatten(), minlength=LOGICAL)


def wanted_loads(counts: torch.Tensor, placement: eplb.Placement, expert_cost: int = 0) -> torch.Tensor:
    return eplb.balance_batch(counts[None], placement, TOPOLOGY, expert_cost=expert_cost)[0]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.int16])
@pytest.mark.parametrize(("padding", "expert_cost"), [(None, 0), (5, 0), (0, 8), (40, 8)])
def test_loads_of_slots_are_those_of_the_split(dtype, padding, expert_cost):
    placement, wide, count = tables(seed=3)
    ids = skewed_ids(1, 40).to(dtype)
    split = BatchSplit(TOPOLOGY, expert_cost=expert_cost)
    mapping = BalancedMapping(split, vllms_own, LOGICAL, WIDTH, SLOTS)
    load = torch.zeros(SLOTS, dtype=torch.int32)
    real = 40 if padding is None else 40 - padding
    unpadded = None if padding is None else torch.tensor(real, dtype=torch.int32)
    slots = mapping(ids, load, wide, count, torch.tensor(True), unpadded)
    assert slots.dtype == dtype
    assert torch.equal(placement.physical_to_logical[0][slots.long()], ids.long())
    assert torch.equal(load, wanted_loads(counts_of(ids[:real].long()), placement, expert_cost).int())
    before = load.clone()
    again = mapping(ids, load, wide, count, torch.tensor(False), unpadded)
    assert torch.equal(again, slots)
    assert torch.equal(load, before), "counted though recording was off"


def test_no_expert_is_no_slot_and_counts_nowhere():
    _, wide, count = tables()
    mapping = BalancedMapping(BatchSplit(TOPOLOGY), vllms_own, LOGICAL, WIDTH, SLOTS)
    load = torch.zeros(SLOTS, dtype=torch.int32)
    slots = mapping(torch.tensor([[-1, 2], [-1, -1]]), load, wide, count, torch.tensor(True))
    assert slots[0, 1] >= 0
    assert slots.flatten()[[0, 2, 3]].tolist() == [-1, -1, -1]
    assert int(load.sum()) == 1
    empty = mapping(torch.empty(0, 2, dtype=torch.int32), load, wide, count, torch.tensor(True))
    assert empty.shape == (0, 2)


class Group:
    """What the mapping takes of vLLM's `GroupCoordinator`."""

    def __init__(self, rank: int = 0, world_size: int = RANKS) -> None:
        self.rank_in_group, self.world_size = rank, world_size
        self.ranks = list(range(world_size))

    def all_gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        assert dim == 0
        parts = [torch.empty_like(tensor) for _ in self.ranks]
        dist.all_gather(parts, tensor)
        return torch.cat(parts)


def layer(**more):
    """A `MoERunner` under tensor parallelism."""
    sizes = {"dp_size": 1, "pcp_size": 1, "is_sequence_parallel": False, **more}
    return SimpleNamespace(
        is_monolithic=sizes.pop("is_monolithic", False),
        do_naive_dispatch_combine=sizes.pop("do_naive_dispatch_combine", False),
        moe_config=SimpleNamespace(**sizes),
    )


class MegaMoE:
    def get_symm_buffer(self):
        raise AssertionError("it needs an accelerator")


def parallel(tensor_parallel_size: int = 2, **more):
    off = {"enable_elastic_ep": False, "use_ubatching": False, "enable_fault_tolerance": False}
    return SimpleNamespace(**{"tensor_parallel_size": tensor_parallel_size, **off, **more})


@pytest.mark.parametrize(
    ("layers", "config", "layout"),
    [
        ([layer()], parallel(4), "replicated"),
        ([layer()], parallel(4, use_ubatching=True, enable_fault_tolerance=True), "replicated"),
        ([layer(dp_size=2)], parallel(1), "sharded"),
        ([layer(pcp_size=2)], parallel(1), "sharded"),
        ([layer(dp_size=2, is_sequence_parallel=True)] * 2, parallel(2), "sharded"),
        ([layer(is_sequence_parallel=True)], parallel(2), "sharded"),
        ([MegaMoE()], parallel(2), "sharded"),
    ],
)
def test_which_tokens_a_rank_has(layers, config, layout):
    assert token_layout(SimpleNamespace(moe_layers=layers), config) == layout


@pytest.mark.parametrize(
    ("layers", "config", "said"),
    [
        ([layer(dp_size=2)], parallel(2), "tensor parallelism 2, data parallelism 2"),
        ([layer(pcp_size=4)], parallel(2), "prefill context parallelism 4"),
        ([layer(), layer(is_sequence_parallel=True)], parallel(2), "replicated and sharded"),
        ([layer(), layer(is_monolithic=True)], parallel(2), "kernel of MoE layer 1"),
        ([layer(dp_size=2, do_naive_dispatch_combine=True)], parallel(1), "gathered before MoE layer 0"),
        ([layer()], parallel(2, enable_elastic_ep=True), "elastic"),
        ([layer(dp_size=2)], parallel(1, use_ubatching=True), "--enable-dbo"),
        ([layer(dp_size=2)], parallel(1, enable_fault_tolerance=True), "fault tolerance"),
        ([], parallel(2), "0 MoE layers"),
    ],
)
def test_unknown_layouts_are_refused(layers, config, said):
    with pytest.raises(eplb.ConfigError, match=said):
        token_layout(SimpleNamespace(moe_layers=layers), config)


def state_of(*models, config=None, device="cpu"):
    """An `EplbState` with models of these layers."""
    _, wide, _ = tables()
    states = {}
    for number, layers in enumerate(models):
        model = SimpleNamespace(
            moe_layers=layers,
            expert_weights=[[torch.zeros(SLOTS // RANKS, 2)]],
            num_logical_experts=LOGICAL,
            num_physical_experts=SLOTS,
        )
        states[str(number)] = SimpleNamespace(model=model, logical_to_physical_map=wide[None].to(device))
    return SimpleNamespace(model_states=states, parallel_config=config or parallel(2))


@pytest.fixture
def vllm(monkeypatch):
    """vLLM's module with the mapping."""
    module = ModuleType(dispatch._MODULE)
    setattr(module, dispatch._NAME, vllms_own)
    monkeypatch.setitem(sys.modules, dispatch._MODULE, module)
    # This module holds the function, too, and has to have it again afterwards.
    monkeypatch.setattr(sys.modules[__name__], "vllms_own", vllms_own)
    return module


def in_force(module):
    return getattr(module, dispatch._NAME)


def test_every_module_gets_the_mapping_and_gives_it_back(vllm, monkeypatch):
    own = in_force(vllm)
    by_name, renamed = ModuleType("a_model"), ModuleType("another_model")
    by_name.eplb_map_to_physical_and_record = renamed.mapping = own
    renamed.other = len
    for module in (by_name, renamed):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sys.modules, "not a module", "but a text")

    bind_dispatch(state_of([layer()]), BALANCED, Group())
    ours = in_force(vllm)
    assert isinstance(ours, BalancedMapping)
    assert ours.own is own
    assert by_name.eplb_map_to_physical_and_record is renamed.mapping is ours
    assert renamed.other is len

    imported_later = ModuleType("a_draft_model")
    imported_later.mapping = ours
    monkeypatch.setitem(sys.modules, imported_later.__name__, imported_later)
    bind_dispatch(state_of([layer()], [layer()]), BALANCED, Group())
    assert in_force(vllm) is not ours
    assert in_force(vllm).own is own, "ours over ours"
    assert imported_later.mapping is renamed.mapping is in_force(vllm)

    restore_mapping()
    for module, name in ((vllm, dispatch._NAME), (by_name, dispatch._NAME), (renamed, "mapping")):
        assert getattr(module, name) is own
    assert imported_later.mapping is own
    restore_mapping()
    assert in_force(vllm) is own


def test_even_is_vllms_own_mapping(vllm):
    own = in_force(vllm)
    bind_dispatch(state_of([layer()]), EngineOptions(), Group())
    assert in_force(vllm) is own
    bind_dispatch(state_of([layer()]), BALANCED, Group())
    bind_dispatch(state_of([layer()]), EngineOptions(), Group())
    assert in_force(vllm) is own


def test_without_the_seam_vllms_mapping_goes_on_and_an_error_says_so(vllm, monkeypatch, caplog):
    def other(topk_ids, expert_load_view, logical_to_physical_map):
        raise AssertionError("never called")

    setattr(vllm, dispatch._NAME, other)
    bind_dispatch(state_of([layer()]), BALANCED, Group())
    assert in_force(vllm) is other
    monkeypatch.delattr(vllm, dispatch._NAME)
    bind_dispatch(state_of([layer()]), BALANCED, Group())
    monkeypatch.setitem(sys.modules, dispatch._MODULE, None)
    bind_dispatch(state_of([layer()]), BALANCED, Group())
    records = [record for record in caplog.records if record.levelno == logging.ERROR]
    said = [record.getMessage() for record in records]
    assert len(said) == 3
    assert all("vLLM's own mapping goes on" in text for text in said)
    assert "takes (topk_ids, expert_load_view, logical_to_physical_map), not (topk_ids, expert_lo" in said[0]
    assert f"lacks {dispatch._MODULE}.{dispatch._NAME}" in said[1] == said[2]


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (state_of([layer(is_monolithic=True)]), "kernel of MoE layer 0"),
        (state_of([layer()], [layer(is_sequence_parallel=True)]), "one model"),
        (state_of([layer()], device="meta"), "device of type meta"),
        (state_of([layer()], config=SimpleNamespace()), "enable_elastic_ep"),
        (state_of([SimpleNamespace(is_monolithic=False)]), "moe_config"),
    ],
)
def test_what_cannot_be_split_is_left_to_vllm(state, said, vllm, caplog):
    own = in_force(vllm)
    bind_dispatch(state_of([layer()]), BALANCED, Group())
    bind_dispatch(state, BALANCED, Group())
    assert in_force(vllm) is own
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert said in record.getMessage()


def test_the_first_rank_says_what_the_dispatch_costs(vllm, caplog):
    caplog.set_level(logging.INFO)
    options = EngineOptions(dispatch="balanced", expert_cost=32)
    bind_dispatch(state_of([layer()]), options, Group())
    bind_dispatch(state_of([layer(dp_size=2)], config=parallel(1)), options, Group())
    bind_dispatch(state_of([layer()]), options, Group(rank=1))
    first, second = (record.getMessage() for record in caplog.records if "dispatch=" in record.getMessage())
    assert "replicated, no message" in first
    assert f"sharded, one all-gather of {LOGICAL * 8} bytes" in second
    assert "expert_cost=32" in first
    assert in_force(vllm).split.expert_cost == 32


def test_ranks_that_differ_in_the_dispatch_differ_in_what_they_announce():
    said = {
        options.model_dump_json()
        for options in (EngineOptions(), BALANCED, EngineOptions(dispatch="balanced", expert_cost=3))
    }
    assert len(said) == 3


def _map_a_batch(rank: int, tokens: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """This rank's counts of experts and loads of slots, for a batch of which it has `tokens` tokens."""
    module = ModuleType(dispatch._MODULE)
    setattr(module, dispatch._NAME, vllms_own)
    sys.modules[dispatch._MODULE] = module
    bind_dispatch(state_of([layer(dp_size=2)], config=parallel(1)), BALANCED, Group(rank))
    placement, wide, count = tables(seed=5)
    ids = skewed_ids(rank, tokens[rank])
    load = torch.zeros(SLOTS, dtype=torch.int32)
    slots = in_force(module)(ids, load, wide, count, torch.tensor(True), torch.tensor(99, dtype=torch.int32))
    assert torch.equal(placement.physical_to_logical[0][slots], ids)
    return counts_of(ids).tolist(), load.tolist()


@pytest.mark.parametrize("tokens", [(30, 20), (25, 0), (1, 0)])
def test_ranks_with_tokens_of_their_own_split_the_whole_batch(tokens):
    counts, loads = (torch.tensor(both) for both in zip(*run_ranks(_map_a_batch, 2, tokens), strict=True))
    assert int(loads.sum()) == sum(tokens) * 3
    placement, _, _ = tables(seed=5)
    assert torch.equal(loads.sum(0), wanted_loads(counts.sum(0), placement))


def _bind_with_auto(rank: int, costs: tuple[int, ...]) -> str:
    module = ModuleType(dispatch._MODULE)
    setattr(module, dispatch._NAME, vllms_own)
    sys.modules[dispatch._MODULE] = module
    dispatch.resolve_expert_cost = lambda option, tensors, device: costs[rank]
    options = EngineOptions(dispatch="balanced", expert_cost="auto")
    try:
        bind_dispatch(state_of([layer()]), options, Group(rank))
    except eplb.AgreementError as error:
        return str(error)
    return str(in_force(module).split.expert_cost)


def test_ranks_with_other_accelerators_do_not_start():
    assert run_ranks(_bind_with_auto, 2, (32, 32)) == ["32", "32"]
    first, second = run_ranks(_bind_with_auto, 2, (32, 48))
    assert "expert_cost=48 on rank 1, here expert_cost=32" in first
    assert "expert_cost=32 on rank 0, here expert_cost=48" in second
