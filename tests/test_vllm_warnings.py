"""What vLLM does silently, without vLLM: small inputs, one line each, a count in report and metrics."""

from __future__ import annotations

import logging
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest

from eplb_plugin.integration.common.options import uneven_slots
from eplb_plugin.integration.vllm.policy import Interval
from eplb_plugin.integration.vllm.seams import wrap_step
from eplb_plugin.integration.vllm.warnings import (
    StallWatch,
    dropped_plan,
    drops_small_plans,
    long_window,
    model_names,
)
from eplb_plugin.observability.prometheus import Telemetry

from .series import samples
from .test_vllm_policy import LAYERS, LOGICAL, RANKS, SLOTS, call, in_force, policy, skewed


@pytest.mark.parametrize(
    ("experts", "redundant", "ranks", "right"),
    [
        (256, 0, 3, "num_redundant_experts=2 would be"),
        (256, 3, 3, "num_redundant_experts=2 or 5 would be"),
        (16, 4, 3, "num_redundant_experts=2 or 5 would be"),
        (128, 1, 16, "num_redundant_experts=0 or 16 would be"),
        (2, 1, 8, "num_redundant_experts=6 would be"),
    ],
)
def test_the_nearest_numbers_that_divide_are_named(experts, redundant, ranks, right):
    told = uneven_slots(experts, redundant, ranks, "num_redundant_experts")
    assert told.endswith(f"are {experts + redundant} slots, not divisible by {ranks} ranks; {right}")
    divide = [n for n in range(experts + ranks) if (experts + n) % ranks == 0]
    below, above = [n for n in divide if n < redundant][-1:], [n for n in divide if n > redundant][:1]
    assert right == f"num_redundant_experts={' or '.join(map(str, below + above))} would be"
    assert all(uneven_slots(experts, n, ranks, "x") is None for n in divide)


def slow_imbalance(load, ids, num_ranks):
    """Max over mean of rank loads that are summed over the layers, by loops."""
    ranks, per_rank = [0.0] * num_ranks, ids.shape[1] // num_ranks
    for row, held in zip(load.tolist(), ids.tolist(), strict=True):
        for slot, expert in enumerate(held):
            ranks[slot // per_rank] += row[expert] / held.count(expert)
    return max(ranks) / (sum(ranks) / num_ranks)


def test_the_rule_for_small_plans_is_what_loops_say():
    generator = torch.Generator().manual_seed(0)
    outcomes = []
    for _ in range(200):
        load = torch.randint(50, 100, (LAYERS, LOGICAL), generator=generator)
        spare = torch.randint(0, LOGICAL, (2, LAYERS, SLOTS - LOGICAL), generator=generator)
        old, new = (torch.cat([torch.arange(LOGICAL).expand(LAYERS, -1), each], 1) for each in spare)
        before, after = (slow_imbalance(load, ids, RANKS) for ids in (old, new))
        told = dropped_plan(load, old, new, RANKS)
        assert (told is None) == ((before - after) / before >= 0.0501)
        if told:
            assert f"goes from {before:.3f} to {after:.3f}, which is below 5%" in told
        outcomes.append(told is None)
    assert 20 < sum(outcomes) < 180
    assert dropped_plan(torch.zeros(LAYERS, LOGICAL), old, new, RANKS)


def test_a_plan_that_vllm_would_drop_is_reported_as_dropped(caplog):
    """Each layer has a hot rank of its own: each gains much, and the sum over layers nothing."""
    hot = torch.ones(RANKS, RANKS * 2, dtype=torch.int64)
    for layer in range(RANKS):
        hot[layer, 2 * layer : 2 * layer + 2] = 90
    load, old = hot[None].repeat(4, 1, 1), torch.arange(8).repeat(RANKS, 1)
    registry = CollectorRegistry()
    ours = policy()
    ours.telemetry = Telemetry(registry)

    def rearrange():
        ours.expect([Interval("moe", load)])
        with caplog.at_level(logging.INFO):
            return ours.rebalance_experts(load.sum(0), 8, 1, 1, RANKS, old)

    planned = rearrange()
    assert not torch.equal(planned, old)
    assert ours.planner_of("moe").reports[-1].balancedness_after > 0.5
    ours.drops_small_plans = True
    kept = rearrange()
    assert torch.equal(kept, old)
    report = ours.planner_of("moe").reports[-1]
    assert (report.skipped, report.moves, report.layers, report.failed) == (True, 0, 0, False)
    assert report.balancedness_after == report.balancedness_before < 0.4
    assert "moves is dropped: vLLM on ROCm drops it: max over mean rank load" in report.reason
    assert report.reason in caplog.messages[-1]
    assert ours.report()["models"]["moe"]["warnings"] == {"dropped_plan": 1}
    values = samples(generate_latest(registry))
    assert values["eplb_warnings_total{dropped_plan,moe}"] == 1
    assert values["eplb_rebalances_total{moe,skipped}"] == 1


def test_a_plan_that_gains_enough_is_not_dropped():
    load, old = skewed(), in_force()
    expected = call(policy(), load, old)
    ours = policy()
    ours.drops_small_plans = True
    assert dropped_plan(load.sum(0), old, expected, RANKS) is None
    assert torch.equal(call(ours, load, old), expected)
    assert not ours.planner_of("moe").warnings


def state_for(rearrange, *, is_async=False):
    return type("EplbState", (), {"rearrange": rearrange, "is_async": is_async})()


def test_small_plans_are_dropped_on_rocm_alone_in_sync_mode_and_by_a_vllm_that_does(monkeypatch):
    def with_rule(self):
        return self.platform.is_rocm()

    def without(self):
        return None

    assert torch.version.hip is None
    assert not drops_small_plans(state_for(with_rule))
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert drops_small_plans(state_for(with_rule))
    assert not drops_small_plans(state_for(with_rule, is_async=True))
    assert not drops_small_plans(state_for(without))


class State:
    """The part of vLLM's `EplbState` that counts: in asynchronous mode the count goes on until the end."""

    def __init__(self, interval: int = 4, is_async: bool = True) -> None:
        self.model = SimpleNamespace(
            model_name="moe", rebalanced=False, expert_load_window=torch.zeros(12, 2, 6, dtype=torch.int32)
        )
        self.model_states = {"hash": self.model}
        self.expert_rearrangement_step, self.is_async = 0, is_async
        self.expert_rearrangement_step_interval = interval

    def step(self, is_dummy: bool = False, is_profile: bool = False) -> None:
        self.expert_rearrangement_step += not is_profile


def watched(state):
    """The warnings of each step of a state, (model, line)."""
    said = []
    keeper = SimpleNamespace(clear=lambda: None)
    wrap_step(state, keeper, None, StallWatch(state, lambda *what: said.append(what)))
    return said


def test_a_rearrangement_that_never_ends_is_told_once_and_counted_each_interval():
    state = State()
    said = watched(state)
    state.model.rebalanced = True
    for _ in range(11):
        state.step()
    assert said == []
    state.step(is_profile=True)
    state.step()
    ((model, line),) = said
    assert model == "moe"
    assert "of moe began 12 steps ago and has not ended within 3 intervals" in line
    for _ in range(8):
        state.step()
    assert said[1:] == [("moe", ""), ("moe", "")]
    # It ended after all, and the next one starts anew.
    state.model.rebalanced, state.expert_rearrangement_step = False, 0
    for _ in range(40):
        state.step()
    assert len(said) == 3


@pytest.mark.parametrize("is_async", [True, False])
def test_nothing_is_told_while_rearrangements_end(is_async):
    state = State(is_async=is_async)
    said = watched(state)
    state.model.rebalanced = not is_async
    for _ in range(40):
        state.step()
    assert said == []


def test_warnings_are_logged_once_counted_and_shown(caplog):
    registry = CollectorRegistry()
    ours = policy()
    ours.telemetry = Telemetry(registry)
    planner = ours.planner_of("moe")
    with caplog.at_level(logging.WARNING):
        for line in ("it hangs", "", "it hangs"):
            planner.warn("stalled_transfer", line)
    assert caplog.messages == ["it hangs"]
    planner.speaks = False
    planner.warn("stalled_transfer", "it hangs again")
    assert caplog.messages == ["it hangs"]
    assert ours.report()["models"]["moe"]["warnings"] == {"stalled_transfer": 4}
    assert samples(generate_latest(registry))["eplb_warnings_total{stalled_transfer,moe}"] == 4


def test_a_window_longer_than_the_interval_is_named_with_its_memory():
    assert long_window(State(interval=12)) is None
    told = long_window(State(interval=4))
    assert "window_size=12 is longer than step_interval=4" in told
    assert f"frees {8 * 2 * 6 * 4 / 2**20:.1f} MiB" in told


def test_only_steps_since_the_last_map_count():
    """A window of 12 steps, an interval of 4: the plan sees the newest 4."""
    from eplb_plugin.integration.vllm.window import fold_window

    window = torch.arange(1, 13, dtype=torch.int32).view(12, 1, 1).repeat(1, 1, 2)
    ids = torch.tensor([[0, 1]])
    folded = fold_window(window, ids, 2, position=0, steps=4, snapshots=32)
    assert folded[:, 0, 0].tolist() == [9, 10, 11, 12]


@pytest.mark.parametrize(
    ("rank", "layers", "name"),
    [
        (0, [3, 4, 29], "deepseek, stage 1 of 2, MoE layers 3 to 29"),
        (1, [30, 59], "deepseek, stage 2 of 2, MoE layers 30 to 59"),
        (1, [], "deepseek, stage 2 of 2"),
    ],
)
def test_a_pipeline_stage_has_a_name_of_its_own(monkeypatch, rank, layers, name):
    """Each stage numbers its MoE layers from 0; the name says which of the model they are."""
    vllm, distributed, state = (ModuleType(part) for part in ("vllm", "distributed", "parallel_state"))
    state.get_pp_group = lambda: SimpleNamespace(rank_in_group=rank, world_size=2)
    modules = {"vllm": vllm, "vllm.distributed": distributed, "vllm.distributed.parallel_state": state}
    for module, stand in modules.items():
        monkeypatch.setitem(sys.modules, module, stand)
    moe_layers = [SimpleNamespace(layer_name=f"model.layers.{layer}.mlp.experts") for layer in layers]
    model = SimpleNamespace(model_name="deepseek", model=SimpleNamespace(moe_layers=moe_layers))
    for stages, expected in ((1, "deepseek"), (2, name)):
        parallel = SimpleNamespace(pipeline_parallel_size=stages)
        stand = SimpleNamespace(model_states={"hash": model}, parallel_config=parallel)
        assert model_names(stand) == [expected]
