"""What vLLM does silently, in vLLM's own classes: one line when a model is loaded or added, and counted."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest
from vllm.distributed.eplb.eplb_state import EplbState

import eplb_plugin as eplb
from eplb_plugin.integration.vllm import plugin as vllm_plugin
from eplb_plugin.integration.vllm.warnings import dropped_plan, drops_small_plans, watch_load
from eplb_plugin.observability.prometheus import Telemetry
from tests.series import samples

from .bare_state import state_with

pytestmark = pytest.mark.usefixtures("registered")


@pytest.mark.parametrize("rocm", [False, True])
@pytest.mark.parametrize("window", [4, 12])
def test_what_vllm_does_silently_is_said_when_a_model_is_added(window, rocm, monkeypatch, caplog):
    """An interval of 4 steps: a window of 12 holds 8 that no plan uses. On ROCm, sync mode drops plans."""
    group = SimpleNamespace(rank_in_group=0, world_size=2, ranks=[0, 1])
    monkeypatch.setattr("vllm.distributed.parallel_state.get_ep_group", lambda: group)
    monkeypatch.setattr(torch.version, "hip", "7.0" if rocm else None)
    model = SimpleNamespace(
        num_moe_layers=2,
        num_logical_experts=4,
        num_physical_experts=6,
        num_local_physical_experts=3,
        num_expert_groups=1,
        moe_layers=[],
        expert_weights=[],
    )

    def add_model(state):
        state.is_async, state.expert_rearrangement_step_interval = False, 4
        state.model_states["model"] = SimpleNamespace(
            model=model,
            model_name="tiny",
            rebalanced=False,
            expert_load_window=torch.zeros(window, 2, 6, dtype=torch.int32),
            physical_to_logical_map=torch.zeros(2, 6),
        )

    monkeypatch.setattr(EplbState, "add_model", add_model)
    state = state_with({"eplb_plugin": {"enabled": True}})
    state.add_model()
    assert caplog.text.count("window_size=12 is longer than step_interval=4") == (window > 4)
    assert caplog.text.count("on ROCm, vLLM's synchronous mode drops plans") == rocm
    assert state.policy.drops_small_plans == rocm
    assert state.policy.planner_of("tiny").warnings == ({"long_window": 1} if window > 4 else {})


@pytest.mark.parametrize(
    ("enabled", "balances", "said"), [(True, False, 1), (True, True, 0), (False, False, 0)]
)
def test_a_server_without_eplb_is_told_that_nothing_will_move(enabled, balances, said, monkeypatch, caplog):
    monkeypatch.undo()  # a worker of our own, beside vLLM's
    monkeypatch.setattr(vllm_plugin, "_share_log", lambda: None)

    class Worker:
        def __init__(self, config, rank):
            self.vllm_config, self.rank = config, rank

        def load_model(self):
            pass

    vllm_plugin._after_init(Worker, vllm_plugin._check_worker)
    config = SimpleNamespace(
        additional_config={"eplb_plugin": {"enabled": enabled}},
        parallel_config=SimpleNamespace(enable_eplb=balances),
    )
    Worker(config, 0), Worker(config, 1)
    assert caplog.text.count("vLLM runs without --enable-eplb") == said
    config.additional_config = {"eplb_plugin": {"histroy": 1}}
    with pytest.raises(eplb.ConfigError, match="histroy"):
        Worker(config, 1)


class LoadingWorker:
    """A worker whose model is `model`, or whose loading raises."""

    def __init__(self, config, rank, model):
        self.vllm_config, self.rank, self.model = config, rank, model
        self.model_config = config.model_config

    def load_model(self):
        if isinstance(self.model, Exception):
            raise self.model

    def get_model(self):
        return self.model


def load(model, rank=0, redundant=4, experts=16, metrics=False):
    """A worker that has loaded `model`, on 2 x 3 ranks, with the plugin enabled."""
    config = SimpleNamespace(
        additional_config={"eplb_plugin": {"enabled": True, "metrics": metrics}},
        model_config=SimpleNamespace(model="tiny", get_num_experts=lambda: experts),
        parallel_config=SimpleNamespace(
            enable_eplb=True,
            tensor_parallel_size=2,
            data_parallel_size=3,
            prefill_context_parallel_size=1,
            eplb_config=SimpleNamespace(num_redundant_experts=redundant),
        ),
    )
    worker = LoadingWorker(config, rank, model)
    vllm_plugin._check_worker(worker)
    worker.load_model()
    return worker


def of_class(architecture):
    """A model of vLLM without weights."""
    from vllm.model_executor.models.registry import ModelRegistry

    model = ModelRegistry.models[architecture].load_model_cls()
    made = model.__new__(model)
    torch.nn.Module.__init__(made)
    return made


@pytest.mark.parametrize("architecture", ["Qwen2MoeForCausalLM", "GptOssForCausalLM", "Qwen3ForCausalLM"])
def test_a_model_that_vllm_does_not_balance_is_named_once(architecture, monkeypatch, caplog):
    monkeypatch.setattr(vllm_plugin, "_warnings", Counter())
    registry = CollectorRegistry()
    monkeypatch.setattr(vllm_plugin, "engine_telemetry", lambda options, first: Telemetry(registry))
    model = of_class(architecture)
    load(model, metrics=True)
    (record,) = [record for record in caplog.records if record.name.startswith("eplb_plugin")]
    said = record.getMessage()
    assert said.startswith(f"eplb_plugin is enabled, but tiny ({architecture}) is no MixtureOfExperts in ")
    assert "Remove --enable-eplb, num_redundant_experts" in said
    assert samples(generate_latest(registry))["eplb_warnings_total{no_eplb_support,tiny}"] == 1
    monkeypatch.setattr(
        "vllm.distributed.parallel_state.get_ep_group", lambda: SimpleNamespace(rank_in_group=0)
    )
    assert vllm_plugin._report(None)["warnings"] == {"no_eplb_support": 1}
    caplog.clear()
    monkeypatch.setattr(vllm_plugin, "engine_telemetry", lambda options, first: None)
    load(model, rank=1)
    assert caplog.text == ""


def test_a_model_that_vllm_balances_is_not_named(monkeypatch, caplog):
    from vllm.model_executor.models.interfaces import MixtureOfExperts, is_mixture_of_experts

    model = of_class("Qwen3MoeForCausalLM")
    for name in MixtureOfExperts.__annotations__:
        if not hasattr(model, name):
            setattr(model, name, 1)
    assert is_mixture_of_experts(model)
    load(model)
    assert caplog.text == ""


def test_a_check_that_fails_does_not_stop_the_load(caplog):
    load(of_class("Qwen3ForCausalLM")).model_config = None
    monkey = SimpleNamespace(load_model=lambda: 7, get_model=lambda: 1 / 0, vllm_config=None)
    said = []
    watch_load(monkey, said.append)
    assert monkey.load_model() == 7
    assert said == []
    assert "whether vLLM balances this model could not be checked; it goes on" in caplog.text


def test_numbers_that_do_not_divide_name_the_nearest_that_do():
    """vLLM's own error, from its own layer, tells the numbers alone."""
    error = ValueError("EPLB currently only supports even distribution of experts across ranks.")
    told = "num_redundant_experts=4: 16 experts and 4 redundant ones are 20 slots, not divisible by 6 ranks; "
    with pytest.raises(eplb.ConfigError) as caught:
        load(error)
    assert str(caught.value) == f"{told}num_redundant_experts=2 or 8 would be (vLLM: {error})"
    # Numbers that divide: the error is another one.
    with pytest.raises(ValueError, match="even distribution") as caught:
        load(error, redundant=2)
    assert not isinstance(caught.value, eplb.EplbError)
    with pytest.raises(eplb.AgreementError):
        load(eplb.AgreementError("ranks differ"))


def test_vllms_layer_ends_with_that_error():
    from vllm.model_executor.layers.fused_moe import layer

    said = str(layer.FusedMoEFactory.__code__.co_consts)
    assert "EPLB currently only supports even distribution of " in said


@pytest.mark.parametrize("seed", range(3))
def test_vllms_rule_for_small_plans_on_rocm_is_ours(seed, monkeypatch):
    """vLLM's own `rearrange`, in synchronous mode and as if on ROCm, moves exactly what the rule allows."""
    from vllm.distributed.eplb import eplb_state

    generator = torch.Generator().manual_seed(seed)
    layers, logical, slots, ranks = 3, 8, 12, 4
    group = SimpleNamespace(rank=lambda: 0, size=lambda: ranks)
    monkeypatch.setattr(eplb_state, "get_ep_group", lambda: SimpleNamespace(device_group=group))
    monkeypatch.setattr(eplb_state, "get_node_count", lambda: 1)
    monkeypatch.setattr(eplb_state, "all_reduce", lambda tensor, group: None)
    monkeypatch.setattr(eplb_state, "current_platform", SimpleNamespace(is_rocm=lambda: True))
    moved = []
    monkeypatch.setattr(eplb_state, "rearrange_expert_weights_inplace", lambda *given: moved.append(given[1]))
    monkeypatch.setattr(eplb_state, "_commit_eplb_maps", lambda *given, **named: None)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    state = state_with({})
    state.expert_load_window_size = 5
    assert drops_small_plans(state)
    state.is_async = True
    assert not drops_small_plans(state)
    state.is_async = False
    outcomes = set()
    for _ in range(30):
        spare = torch.randint(0, logical, (2, layers, slots - logical), generator=generator)
        old, new = (torch.cat([torch.arange(logical).expand(layers, -1), each], 1) for each in spare)
        # Rows of equal order: the hot ranks of layers meet in the sum, as the rule needs it.
        new = new[:, torch.randperm(slots, generator=generator)]
        window = (1000 * torch.rand(5, layers, slots, generator=generator) ** 6).int()
        load = torch.zeros(layers, logical, dtype=torch.int64)
        load.scatter_add_(1, old, window.sum(0).long())
        model = SimpleNamespace(
            num_logical_experts=logical,
            num_moe_layers=layers,
            num_physical_experts=slots,
            num_expert_groups=1,
            expert_weights=[],
        )
        state.model_states = {
            "model": SimpleNamespace(
                expert_load_window=window,
                physical_to_logical_map=old,
                model=model,
                expert_buffer=[],
                communicator=None,
                last_expert_load=load,
            )
        }
        asked = []

        def answer(weight, *numbers, new=new, asked=asked):
            asked.append(weight)
            return new

        state.policy = SimpleNamespace(rebalance_experts=answer)
        moved.clear()
        state.rearrange()
        assert torch.equal(asked[0].long(), load)
        told = dropped_plan(asked[0], old, new, ranks)
        assert (told is None) == bool(moved)
        outcomes.add(bool(moved))
    assert outcomes == {True, False}
