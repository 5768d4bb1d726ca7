"""What the plugin does to SGLang itself: what it refuses at launch, what it leaves alone, what it misses."""

from __future__ import annotations

import logging
import sys
import types
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest

from eplb_plugin import ConfigError
from eplb_plugin.integration.common.options import EngineOptions
from eplb_plugin.integration.common.planner import EnginePlanner
from eplb_plugin.integration.common.replacement import replace_function
from eplb_plugin.integration.common.seams import missing_here
from eplb_plugin.integration.sglang import dispatch_seams
from eplb_plugin.integration.sglang import plugin as sglang_plugin
from eplb_plugin.integration.sglang.dispatch import to_slots
from eplb_plugin.integration.sglang.policy import SglangBalancer
from eplb_plugin.integration.sglang.seam_table import SEAMS
from eplb_plugin.integration.sglang.seams import missing_seams, warn_unmoved
from eplb_plugin.observability.prometheus import Telemetry
from tests.series import samples


@pytest.fixture(scope="module", autouse=True)
def plugins():
    """Load the plugins as each process of SGLang does."""
    from sglang.srt.plugins import load_plugins

    load_plugins()


def resolve(tiny, **arguments):
    """What SGLang does with its arguments before it starts anything."""
    from sglang.srt.server_args import ServerArgs

    server_args = ServerArgs(model_path=str(tiny.path), device="cpu", tp_size=2, ep_size=2, **arguments)
    server_args.resolve_once()
    return server_args


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"eplb_algorithm": "eplb_plugin"},
            "--eplb-algorithm eplb_plugin does nothing without --enable-eplb",
        ),
        ({"eplb_algorithm": "ensemble"}, "--eplb-algorithm ensemble does nothing without --enable-eplb"),
        ({"eplb_algorithm": "eplb_plugin:history=9"}, "does nothing without --enable-eplb"),
        ({"enable_eplb": True, "eplb_algorithm": "eplb_plugin:"}, "no option follows the colon"),
        (
            {"enable_eplb": True, "eplb_algorithm": "eplb_plugin:history=0"},
            "history: .* greater than or equal to 1",
        ),
        ({"enable_eplb": True, "eplb_algorithm": "eplb_plugin:history"}, "'history' is not OPTION=VALUE"),
        ({"enable_eplb": True, "eplb_algorithm": "eplb_plugin:config=/no/such"}, "/no/such: no such file"),
        (
            {"enable_eplb": True, "eplb_algorithm": "eplb_plugin", "elastic_ep_backend": "nixl"},
            "cannot plan around failed ranks",
        ),
    ],
)
def test_launch_is_refused(tiny, arguments, message):
    with pytest.raises(ConfigError, match=message):
        resolve(tiny, **arguments)


@pytest.mark.parametrize(
    "algorithm",
    [
        "auto",
        "deepseek",
        "deepseek_vec",
        "eplb_plugin",
        "eplb_plugin:history=2",
        "ensemble",
        "ensemble:history=2",
    ],
)
def test_launch_is_allowed(tiny, algorithm):
    assert resolve(tiny, enable_eplb=True, eplb_algorithm=algorithm).eplb_algorithm == algorithm


def test_an_untested_version_is_told(tiny, monkeypatch, caplog):
    from sglang.version import __version__

    adapter = sglang_plugin.ADAPTER
    assert adapter.untested(__version__) is None
    with caplog.at_level(logging.WARNING):
        resolve(tiny, enable_eplb=True, eplb_algorithm="eplb_plugin")
        assert "was tested with" not in caplog.text
        monkeypatch.setattr(sglang_plugin, "ADAPTER", replace(adapter, tested=("0.5.1", "0.5.2")))
        resolve(tiny, enable_eplb=True, eplb_algorithm="eplb_plugin")
        assert f"eplb_plugin was tested with SGLang 0.5.1, 0.5.2, not {__version__}" in caplog.text
        caplog.clear()
        resolve(tiny, enable_eplb=True, eplb_algorithm="deepseek")
        assert "was tested with" not in caplog.text


def test_a_missing_hook_stops_the_launch(tiny, monkeypatch, caplog):
    from sglang.srt.eplb import eplb_algorithms, expert_distribution

    assert missing_seams() == []
    assert missing_here(SEAMS) == []
    monkeypatch.delattr(eplb_algorithms, "compute_algorithm")
    monkeypatch.setattr(eplb_algorithms, "rebalance_experts", lambda tokens_per_expert: None)
    monkeypatch.setattr(expert_distribution._CircularBuffer, "__init__", lambda self: None)
    missing = missing_seams()
    assert sum("compute_algorithm is missing" in line for line in missing) == 1
    assert sum("rebalance_experts has no argument" in line for line in missing) == 5
    assert sum("has no _curr_index" in line for line in missing) == 1
    assert len(missing) == 7
    with pytest.raises(ConfigError, match=r"eplb-plugin hooks into: .*compute_algorithm is missing"):
        resolve(tiny, enable_eplb=True, eplb_algorithm="eplb_plugin")
    # Other algorithms start all the same.
    resolve(tiny, enable_eplb=True, eplb_algorithm="deepseek")


BALANCED = "eplb_plugin:dispatch=balanced"


@pytest.mark.parametrize(
    ("arguments", "on_cuda", "message"),
    [
        ({"ep_dispatch_algorithm": "static"}, False, "'static'; give dynamic"),
        ({"ep_dispatch_algorithm": "fake"}, False, "'fake'; give dynamic"),
        ({"moe_a2a_backend": "deepep", "ep_dispatch_algorithm": "lp"}, False, "deepep needs NVIDIA GPUs"),
        ({"moe_a2a_backend": "deepep"}, True, "deepep: --ep-dispatch-algorithm is None; give lp"),
    ],
)
def test_launch_without_a_balanced_dispatch_is_refused(tiny, monkeypatch, arguments, on_cuda, message):
    monkeypatch.setattr("sglang.srt.utils.is_cuda", lambda: on_cuda)
    with pytest.raises(ConfigError, match=message):
        resolve(tiny, enable_eplb=True, eplb_algorithm=BALANCED, **arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"expected": "dynamic"},
        {"moe_a2a_backend": "deepep", "ep_dispatch_algorithm": "lp", "expected": "lp"},
    ],
)
def test_launch_with_a_balanced_dispatch(tiny, monkeypatch, arguments):
    from sglang.srt.arg_groups.overrides import resolved_view

    monkeypatch.setattr("sglang.srt.utils.is_cuda", lambda: True)
    expected = arguments.pop("expected")
    server_args = resolve(tiny, enable_eplb=True, eplb_algorithm=BALANCED, **arguments)
    assert resolved_view(server_args).ep_dispatch_algorithm == expected


def test_a_missing_seam_of_the_dispatch_stops_only_launches_that_need_it(tiny, monkeypatch):
    from sglang.srt.eplb import expert_location_dispatch, lplb_solver

    monkeypatch.setattr("sglang.srt.utils.is_cuda", lambda: True)
    own_tokens = {"moe_a2a_backend": "deepep", "ep_dispatch_algorithm": "lp"}
    monkeypatch.setattr(lplb_solver, "set_global_lplb_solver", lambda layer, solver: None)
    with pytest.raises(ConfigError, match="set_global_lplb_solver has no argument 'layer_id'"):
        resolve(tiny, enable_eplb=True, eplb_algorithm=BALANCED, **own_tokens)
    resolve(tiny, enable_eplb=True, eplb_algorithm=BALANCED)
    monkeypatch.delattr(expert_location_dispatch, "topk_ids_logical_to_physical")
    with pytest.raises(
        ConfigError, match=r"lacks .*: .*topk_ids_logical_to_physical is missing .* dispatch=even needs"
    ):
        resolve(tiny, enable_eplb=True, eplb_algorithm=BALANCED)
    resolve(tiny, enable_eplb=True, eplb_algorithm="eplb_plugin")
    assert missing_seams() == []


def test_the_mapping_is_replaced_wherever_it_is(monkeypatch):
    from sglang.srt.eplb import expert_location_dispatch
    from sglang.srt.hardware_backend.npu.moe import topk as npu_topk
    from sglang.srt.layers.moe import hash_topk, topk

    name = "topk_ids_logical_to_physical"
    holders = (expert_location_dispatch, topk, hash_topk, npu_topk)
    for module in holders:
        monkeypatch.setattr(module, name, getattr(module, name))  # put back at the end
    before = {getattr(module, name) for module in holders}
    assert len(before) == 1
    replace_function(expert_location_dispatch.topk_ids_logical_to_physical, to_slots)
    assert all(getattr(module, name) is to_slots for module in holders)
    left = [
        module.__name__
        for module in list(sys.modules.values())
        if isinstance(module, types.ModuleType) and any(value in before for value in _functions(module))
    ]
    assert left == []


def _functions(module):
    return [value for value in vars(module).values() if isinstance(value, types.FunctionType)]


@pytest.mark.parametrize("name", ["DeepseekV3ForCausalLM", "Qwen3MoeForCausalLM"])
def test_models_whose_ranks_take_part_without_tokens(name):
    dispatch_seams._check_model([name])


def test_models_that_might_leave_out_a_rank_without_tokens_are_refused():
    with pytest.raises(ConfigError, match="layers of MixtralForCausalLM, and the others would wait"):
        dispatch_seams._check_model(["MixtralForCausalLM"])


def test_solvers_of_other_algorithms_are_sglangs(monkeypatch):
    from sglang.srt.model_executor import model_runner
    from sglang.srt.model_executor.model_runner_components import moe_ep_setup

    assert model_runner.init_lplb_solvers is moe_ep_setup.init_lplb_solvers
    model_config = SimpleNamespace(hf_config=SimpleNamespace(architectures=["MixtralForCausalLM"]))
    for algorithm in ("deepseek", "eplb_plugin"):
        monkeypatch.setattr(sglang_plugin, "algorithm_in_use", lambda algorithm=algorithm: algorithm)
        with pytest.raises(NotImplementedError, match="does not support --ep-dispatch-algorithm lp"):
            moe_ep_setup.init_lplb_solvers(model_config=model_config)
    monkeypatch.setattr(sglang_plugin, "algorithm_in_use", lambda: BALANCED)
    monkeypatch.setattr(dispatch_seams, "map_in_force", map_of_eight)
    with pytest.raises(ConfigError, match="layers of MixtralForCausalLM"):
        model_runner.init_lplb_solvers(model_config=model_config)


def map_of_eight():
    """SGLang's metadata for 1 layer, 8 experts, 8 slots and 2 ranks."""
    placed = torch.arange(8)[None]
    return SimpleNamespace(
        physical_to_logical_map=placed,
        physical_to_logical_map_cpu=placed,
        num_logical_experts=8,
        num_physical_experts=8,
        ep_size=2,
    )


def test_without_a_launch_hook_loading_the_model_is_refused(monkeypatch):
    """SGLang makes its manager when it loads the model: the last chance to say that hooks are missing."""
    from sglang.srt.arg_groups import resolution_hooks
    from sglang.srt.eplb.eplb_manager import EPLBManager

    monkeypatch.delattr(resolution_hooks, "register_resolution_hook")
    sglang_plugin.register()  # it does not raise: SGLang would swallow that
    monkeypatch.setattr(sglang_plugin, "algorithm_in_use", lambda: "eplb_plugin")
    with pytest.raises(ConfigError, match="register_resolution_hook is missing"):
        sglang_plugin._start(lambda manager: None, object.__new__(EPLBManager))


@pytest.mark.parametrize("algorithm", ["deepseek", "deepseek_hierarchical", "deepseek_vec"])
def test_algorithms_of_sglang_get_the_same_answer_as_without_the_plugin(algorithm):
    from sglang.srt.eplb import eplb_algorithms

    counts = torch.randint(1, 100, (4, 3, 16), generator=torch.Generator().manual_seed(0))
    hooked = eplb_algorithms.compute_algorithm(raw_algorithm=algorithm, num_groups=4, num_nodes=2)
    assert hooked is eplb_algorithms.compute_algorithm.__wrapped__(algorithm, 4, 2)
    arguments = (counts, 24, 6, 4, 2, hooked)
    for ours, theirs in zip(
        eplb_algorithms.rebalance_experts(*arguments),
        eplb_algorithms.rebalance_experts.__wrapped__(*arguments),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


def test_an_unknown_algorithm_is_still_unknown():
    from sglang.srt.eplb import eplb_algorithms

    with pytest.raises(KeyError):
        eplb_algorithms.compute_algorithm("ensemblex", None, 1)


def serving(algorithm="eplb_plugin", redundant=4, ep_size=2):
    """A server's arguments in force in this process, until the end of the block."""
    from sglang.srt.runtime_context import get_context

    return get_context().override_server_args(
        enable_eplb=True,
        eplb_algorithm=algorithm,
        ep_num_redundant_experts=redundant,
        tp_size=ep_size,
        ep_size=ep_size,
    )


def config_of(tiny, monkeypatch, architecture):
    """SGLang's configuration of a model: 16 experts where its architecture has EPLB support."""
    from sglang.srt.configs.model_config import ModelConfig

    config = ModelConfig(str(tiny.path))
    monkeypatch.setattr(config.hf_config, "architectures", [architecture])
    return config


@pytest.mark.parametrize(
    ("architecture", "redundant", "message"),
    [
        (
            "Qwen3MoeForCausalLM",
            1,
            "--eplb-algorithm eplb_plugin: --ep-num-redundant-experts=1: 16 experts and 1 redundant ones are "
            r"17 slots, not divisible by 2 ranks; --ep-num-redundant-experts=0 or 2 would be$",
        ),
        (
            "LlamaForCausalLM",
            4,
            "LlamaForCausalLM has no EPLB support in this SGLang: no expert would move. Remove "
            "--enable-eplb, --eplb-algorithm and --ep-num-redundant-experts",
        ),
        (
            "Glm4MoeForCausalLM",
            4,
            "Glm4MoeForCausalLM has no routed_experts_weights_of_layer in this SGLang, which would end at "
            "its first rebalance. Remove --enable-eplb",
        ),
    ],
)
def test_the_first_map_is_refused_by_name(tiny, monkeypatch, architecture, redundant, message):
    """SGLang itself ends with bare assertions there."""
    from sglang.srt.eplb import expert_location
    from sglang.srt.model_executor import model_runner

    compute = model_runner.compute_initial_expert_location_metadata
    assert compute is expert_location.compute_initial_expert_location_metadata
    config = config_of(tiny, monkeypatch, architecture)
    monkeypatch.setattr(config.hf_config, "n_routed_experts", 16, raising=False)
    monkeypatch.setattr(config.hf_config, "n_group", 1, raising=False)
    with serving(redundant=redundant), pytest.raises(ConfigError, match=message):
        compute(model_config=config, moe_ep_rank=0)
    with serving(algorithm="deepseek", redundant=redundant):
        if redundant == 1:
            with pytest.raises(AssertionError):
                compute(model_config=config, moe_ep_rank=0)
        elif architecture == "LlamaForCausalLM":
            assert compute(model_config=config, moe_ep_rank=0) is None


def test_numbers_that_divide_make_a_first_map(tiny, monkeypatch):
    from sglang.srt.eplb import expert_location

    config = config_of(tiny, monkeypatch, "Qwen3MoeForCausalLM")
    with serving():
        first = expert_location.compute_initial_expert_location_metadata(config, 0)
    assert first.physical_to_logical_map.shape[1] == 20


def test_a_recorded_load_is_planned_from_at_start(caplog):
    """`--init-expert-location COUNTS` with our algorithm: there is no map in force yet."""
    with serving():
        plan_from_a_recorded_load()
        assert "fused shared experts" not in caplog.text
        # A column more than experts, of a fused shared expert that every token goes to: it changes nothing.
        plan_from_a_recorded_load(shared=[400])
    assert "have 9 columns for 8 routed experts: the last 1 are taken for fused shared experts" in caplog.text


def plan_from_a_recorded_load(shared=()):
    from sglang.srt.eplb import eplb_algorithms
    from sglang.srt.eplb.expert_location import get_global_expert_location_metadata

    assert get_global_expert_location_metadata() is None
    algorithm = eplb_algorithms.compute_algorithm(raw_algorithm="eplb_plugin", num_groups=None, num_nodes=1)
    assert isinstance(algorithm, SglangBalancer)
    assert eplb_algorithms.compute_algorithm("eplb_plugin", None, 1) is algorithm
    assert isinstance(eplb_algorithms.compute_algorithm("ensemble", None, 1), SglangBalancer)
    counts = torch.zeros(1, 2, 8 + len(shared), dtype=torch.int64)
    counts[0, 1] = torch.tensor([50, 1, 1, 1, 1, 1, 1, 50, *shared])
    placed, slots, count = eplb_algorithms.rebalance_experts(
        tokens_per_expert=counts,
        num_physical_experts=12,
        num_local_physical_experts=6,
        num_groups=None,
        num_nodes=1,
        algorithm=algorithm,
    )
    assert placed.shape == (2, 12)
    assert placed.dtype == slots.dtype == torch.int64
    assert count.sum(1).tolist() == [12, 12]
    # Experts 0 and 7 have nearly all of the load: a replica of each on either rank.
    assert all({0, 7} <= set(rank) for rank in placed[1].view(2, 6).tolist())
    for layer in range(2):
        for expert in range(8):
            held = [slot for slot in slots[layer, expert].tolist() if slot >= 0]
            assert held == (placed[layer] == expert).nonzero().flatten().tolist()


def test_what_sglang_does_not_move_is_warned_of(caplog):
    """SGLang moves the parameters of `FusedMoE` and no other tensor of it."""
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
    from sglang.srt.models.qwen3_moe import Qwen3MoeSparseMoeBlock

    model = torch.nn.Module()
    blocks = []
    for layer in (2, 3, 4):
        block = Qwen3MoeSparseMoeBlock.__new__(Qwen3MoeSparseMoeBlock)
        experts = FusedMoE.__new__(FusedMoE)
        for module in (block, experts):
            torch.nn.Module.__init__(module)
        experts.layer_id, experts.num_local_experts = layer, 5
        experts.w13_weight = torch.nn.Parameter(torch.rand(5, 4, 2))
        experts.w13_weight_scale = torch.nn.Parameter(torch.rand(5, 4))
        experts.w13_input_scale = torch.nn.Parameter(torch.rand(16))
        experts.register_buffer("expert_mask_gpu", torch.arange(5, dtype=torch.int32))
        block.experts = experts
        model.add_module(f"layer{layer}", block)
        blocks.append(block)
    manager = SimpleNamespace(_get_model=lambda: model)

    def ours():
        return [record.getMessage() for record in caplog.records if record.name.startswith("eplb_plugin")]

    moved = {block.experts.layer_id: block.get_moe_weights() for block in blocks}
    assert [len(tensors) for tensors in moved.values()] == [2, 2, 2]
    model.routed_experts_weights_of_layer = moved
    planner = EnginePlanner(EngineOptions())
    registry = CollectorRegistry()
    planner.telemetry = Telemetry(registry).of("tiny")
    warn_unmoved(manager, planner.warn)
    assert ours() == []
    for block in blocks[1:]:
        # As SGLang keeps padded scales for one of its kernels.
        block.experts.hpc_ops_w13_weight_scale = torch.rand(5, 8)
    warn_unmoved(manager, planner.warn)
    (said,) = ours()
    assert said.endswith(": layers 3-4: hpc_ops_w13_weight_scale (5, 8) float32")
    assert planner.warnings == {"unmoved_tensors": 1}
    assert samples(generate_latest(registry))["eplb_warnings_total{unmoved_tensors,tiny}"] == 1
    warn_unmoved(SimpleNamespace(), planner.warn)
    assert "could not be checked; it goes on" in ours()[-1]
