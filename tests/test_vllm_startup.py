"""What is wrong with a model that vLLM has loaded, without vLLM: two ranks, small weights, one line each."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest

from eplb_plugin.integration.common.options import EngineOptions
from eplb_plugin.integration.common.planner import EnginePlanner
from eplb_plugin.integration.vllm.startup import check_start, check_weights
from eplb_plugin.integration.vllm.warnings import never_stepped
from eplb_plugin.observability.prometheus import Telemetry
from eplb_plugin.runtime.control.rank_group import RankGroup

from .processes import run_ranks
from .series import samples

LOGICAL, SLOTS, LAYERS = 4, 6, 3
IDS = torch.tensor([0, 1, 2, 3, 0, 1], dtype=torch.int32).expand(LAYERS, -1)
FIRST = 30  # the model's own number of the first MoE layer


class RoutedExperts(torch.nn.Module):
    """As vLLM's: what moves are its parameters."""

    def __init__(self, layer: int, experts: list[int]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(layer)
        of_expert = torch.rand(LOGICAL, 4, 2, generator=generator)
        self.w13_weight = torch.nn.Parameter(of_expert[experts].clone(), requires_grad=False)
        self.w13_scale = torch.nn.Parameter(of_expert[experts, :, 0].clone(), requires_grad=False)
        self.quant_method = SimpleNamespace(
            moe_quant_config=SimpleNamespace(_w1=None, _a1=torch.rand(1).expand(3))
        )


def state_of(rank: int) -> tuple[SimpleNamespace, list[RoutedExperts]]:
    """vLLM's `EplbState` of two ranks with three slots each, and the experts of its layers."""
    experts = [RoutedExperts(layer, IDS[0, 3 * rank : 3 * rank + 3].tolist()) for layer in range(LAYERS)]
    model = SimpleNamespace(
        moe_layers=[
            SimpleNamespace(routed_experts=one, layer_name=f"model.layers.{FIRST + layer}.mlp.experts")
            for layer, one in enumerate(experts)
        ],
        num_logical_experts=LOGICAL,
        num_local_physical_experts=3,
    )
    model_state = SimpleNamespace(
        model=model,
        model_name="moe",
        physical_to_logical_map=IDS.clone(),
        expert_load_window=torch.zeros(4, LAYERS, SLOTS, dtype=torch.int32),
    )
    state = SimpleNamespace(model_states={"hash": model_state}, expert_rearrangement_step_interval=4)
    return state, experts


@dataclass
class Seen:
    lines: list[str]
    counted: dict[str, int]
    shown: dict[str, float]


def look(rank: int, fault: str) -> Seen:
    """The checks of one rank."""
    stand_in_for_vllm(v2=True)
    state, experts = state_of(rank)
    if fault == "not loaded" and rank == 1:
        experts[2].w13_weight.data[1:] = 0  # slots 4 and 5: replicas of experts 0 and 1
    if fault == "derived":
        for one in experts[1:]:
            one.quant_method.moe_quant_config._w1 = one.w13_scale.amax(1) * 0.5
    if fault == "plain attributes":
        weight = experts[0].w13_weight.data
        del experts[0].w13_weight
        experts[0].w13_weight = weight
    model = state.model_states["hash"].model
    model.expert_weights = [[each.view(3, -1) for each in one.parameters()] for one in experts]
    if fault == "elastic":
        state.parallel_config = SimpleNamespace(enable_elastic_ep=True, pipeline_parallel_size=1)
        if rank == 1:
            return Seen([], {}, {})  # this rank has been there for long

    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("eplb_plugin").addHandler(handler)
    registry = CollectorRegistry()
    planner = EnginePlanner(EngineOptions(), model="moe", speaks=rank == 0)
    planner.telemetry = Telemetry(registry).of("moe")
    check_start(state, planner, RankGroup)
    values = samples(generate_latest(registry))
    shown = {name: value for name, value in values.items() if name.startswith("eplb_warnings") and value}
    return Seen(lines, dict(planner.warnings), shown)


STANDS = ("vllm", "vllm.config", "vllm.distributed", "vllm.distributed.parallel_state")


def stand_in_for_vllm(*, v2: bool, pooling: bool = False, stages: int = 1, last: bool = True, backend="mp"):
    """What the checks ask vLLM, in its place among the modules."""
    config = SimpleNamespace(
        use_v2_model_runner=v2,
        model_config=SimpleNamespace(runner_type="pooling" if pooling else "generate"),
        parallel_config=SimpleNamespace(pipeline_parallel_size=stages, distributed_executor_backend=backend),
    )
    modules = {name: ModuleType(name) for name in STANDS}
    modules["vllm.config"].get_current_vllm_config_or_none = lambda: config
    group = SimpleNamespace(is_last_rank=last)
    modules["vllm.distributed.parallel_state"].get_pp_group = lambda: group
    sys.modules.update(modules)


UNMOVED = (
    "tensors with a row for each slot do not move with the experts; if they belong to experts, answers are "
)
CASES = {
    # vllm 37322
    "not loaded": (
        "differing_replicas",
        "2 of 12 experts have replicas with different weights, so answers depend on the replica that serves "
        "a token (slots that were not loaded, or --load-format dummy); the first (layer, expert): "
        "(32, 0), (32, 1)",
    ),
    # vllm 34646 and 37217
    "derived": (
        "unmoved_tensors",
        f"{UNMOVED}wrong after a rebalance: layers 31-32: quant_method.moe_quant_config._w1 (3,) float32",
    ),
    # vllm 47588
    "plain attributes": (
        "unmoved_tensors",
        f"{UNMOVED}wrong after a rebalance: layer 30: w13_weight (3, 4, 2) float32",
    ),
}


@pytest.mark.parametrize("fault", CASES)
def test_it_is_named_once_and_counted_on_every_rank(fault):
    cause, line = CASES[fault]
    first, second = run_ranks(look, 2, fault)
    assert first.lines == [f"moe: {line}"]
    assert second.lines == []
    assert first.counted == second.counted == {cause: 1}
    assert first.shown == {f"eplb_warnings_total{{{cause},moe}}": 1.0}


def test_nothing_is_told_of_sound_weights():
    assert run_ranks(look, 2, "none") == [Seen([], {}, {})] * 2


def test_a_rank_that_joins_an_elastic_group_waits_for_nobody():
    """The ranks that are there already load nothing, so the one that joins looks at its own weights alone."""
    assert run_ranks(look, 2, "elastic") == [Seen([], {}, {})] * 2


def cannot_read(rank: int) -> tuple[list[str], list[str]]:
    """One rank's weights are not as vLLM makes them."""
    stand_in_for_vllm(v2=True)
    state, experts = state_of(rank)
    model = state.model_states["hash"].model
    model.expert_weights = [[each.view(3, -1) for each in one.parameters()] for one in experts]
    if rank == 1:
        model.expert_weights[1] = [torch.rand(2, 8)]
    errors: list[str] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: errors.append(f"{record.getMessage()} {record.exc_info[1]}")
    logging.getLogger("eplb_plugin").addHandler(handler)
    warned: list[str] = []
    check_weights(model, IDS, RankGroup, lambda cause, line: warned.append(cause))
    return errors, warned


def test_a_rank_that_cannot_look_is_told_to_all_and_ends_nothing():
    for errors, warned in run_ranks(cannot_read, 2):
        (error,) = errors
        assert error.startswith(
            "whether replicas of an expert have the same weights could not be checked; it "
        )
        assert "failed on 1 of 2 ranks: rank 1: TransferError: a weight of layer 31" in error
        assert warned == ["unmoved_tensors"], "rank 1 does not move its own weights of that layer"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"v2": False, "stages": 2, "last": False}, "the stages of a pipeline before the last one"),
        ({"v2": False, "pooling": True}, "pooling models"),
        ({"v2": False, "stages": 2, "last": True}, None),
        ({"v2": False, "stages": 2, "last": False, "backend": "external_launcher"}, None),
        ({"v2": False}, None),
        ({"v2": True, "stages": 2, "last": False}, None),
        ({"v2": True, "pooling": True}, None),
    ],
)
def test_steps_that_vllm_does_not_count_are_named(monkeypatch, given, told):
    for name in STANDS:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))  # and back to what was there
    stand_in_for_vllm(**given)
    line = never_stepped()
    assert (line is None) == (told is None)
    if told:
        assert line.startswith(
            f"vLLM's model runner V1 counts no steps of {told}: no expert will move there."
        )
