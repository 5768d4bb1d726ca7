"""The entry point in vLLM's own classes, without an engine: when it acts, when it refuses or stays out."""

import logging
from collections import Counter
from importlib.metadata import entry_points
from types import SimpleNamespace

import pytest
import torch
import yaml
from prometheus_client import CollectorRegistry, generate_latest
from vllm.config import set_current_vllm_config
from vllm.distributed.eplb import policy as policies
from vllm.distributed.eplb.eplb_state import EplbState
from vllm.v1.worker.worker_base import WorkerBase

import eplb_plugin as eplb
from eplb_plugin.integration.common.options import EngineOptions
from eplb_plugin.integration.common.seams import missing_here
from eplb_plugin.integration.vllm import plugin as vllm_plugin
from eplb_plugin.integration.vllm.dispatch import BalancedMapping, bind_dispatch, restore_mapping
from eplb_plugin.integration.vllm.seam_table import SEAMS
from eplb_plugin.integration.vllm.seams import missing_seams
from eplb_plugin.integration.vllm.warnings import dropped_plan, drops_small_plans, watch_load
from eplb_plugin.observability.prometheus import Telemetry
from tests.series import samples


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """The plugins of this environment, as vLLM loads them, on a class that is as before afterwards."""
    from vllm_eplb_on_cpu.device import with_cpu_streams

    with_cpu_streams()
    monkeypatch.setattr(EplbState, "__init__", EplbState.__init__)
    monkeypatch.setattr(WorkerBase, "__init__", WorkerBase.__init__)
    monkeypatch.setattr(vllm_plugin, "_active", [])
    # The lines go to the root logger, where caplog reads them, not to vLLM's.
    monkeypatch.setattr(vllm_plugin, "_share_log", lambda: None)
    monkeypatch.delenv("EPLB_PLUGIN_CONFIG", raising=False)
    (ours,) = (one for one in entry_points(group="vllm.general_plugins") if one.name == "eplb_plugin")
    ours.load()()


def state_with(additional_config):
    """vLLM's state, made while vLLM has this configuration."""
    config = SimpleNamespace(additional_config=additional_config)
    try:
        with set_current_vllm_config(config):
            return EplbState(SimpleNamespace(), torch.device("cpu"))
    except AttributeError:
        pytest.fail("vLLM looked for more than additional_config")


def test_registering_again_wraps_nothing_again():
    once = EplbState.__init__, WorkerBase.__init__
    vllm_plugin.register()
    assert (EplbState.__init__, WorkerBase.__init__) == once


@pytest.mark.parametrize("additional_config", [{}, {"other": 1}, {"eplb_plugin": {"enabled": False}}])
def test_vllm_is_untouched_unless_enabled(additional_config):
    state = state_with(additional_config)
    assert not {"add_model", "rearrange"} & set(vars(state))
    assert state.policy is policies.DefaultEplbPolicy


def test_enabled_it_binds_to_the_state_alone():
    state = state_with({"eplb_plugin": {"enabled": True}})
    assert "add_model" in vars(state)
    assert state_with({}).add_model.__func__ is EplbState.add_model


def test_our_lines_come_out_as_vllms_do(monkeypatch):
    ours = logging.getLogger("eplb_plugin")
    monkeypatch.undo()
    monkeypatch.setattr(ours, "parent", ours.parent)
    vllm_plugin._share_log()
    assert logging.getLogger("eplb_plugin.integration.vllm.policy").parent is ours
    assert ours.parent is logging.getLogger("vllm")


def test_a_file_enables_it_and_vllms_arguments_go_over_the_file(tmp_path, monkeypatch):
    path = tmp_path / "vllm.yaml"
    path.write_text(yaml.safe_dump({"eplb_plugin": {"enabled": True, "history": 7}}))
    monkeypatch.setenv("EPLB_PLUGIN_CONFIG", str(path))
    assert vllm_plugin.vllm_options({}) == vllm_plugin.VllmOptions(enabled=True, history=7)
    assert "add_model" in vars(state_with({}))
    assert "add_model" not in vars(state_with({"eplb_plugin": {"enabled": False}}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"enabled": True, "histroy": 2}, "histroy"),
        ({"enabled": True, "history": 0}, "history"),
        (
            {"enabled": True, "planner": {"policy": "magic"}},
            "policy='magic' is unknown; there are adaptive, ensemble, greedy",
        ),
        ({"enabled": "perhaps"}, "enabled"),
        ("on", "not options with values"),
    ],
)
def test_bad_options_end_the_start_with_their_name(options, message):
    with pytest.raises(eplb.ConfigError, match=message) as error:
        state_with({"eplb_plugin": options})
    assert "additional_config" in str(error.value)


def test_a_bad_file_ends_the_start_of_every_process(tmp_path, monkeypatch):
    path = tmp_path / "vllm.yaml"
    path.write_text("eplb_plugin: {enabled: true, snapshots: none}")
    monkeypatch.setenv("EPLB_PLUGIN_CONFIG", str(path))
    with pytest.raises(eplb.ConfigError, match=r"EPLB_PLUGIN_CONFIG: eplb_plugin: .*snapshots"):
        vllm_plugin.register()


def test_this_vllm_has_all_that_is_needed():
    assert missing_seams() == []
    assert missing_here(SEAMS) == []


@pytest.mark.parametrize("gone", ["rearrange", "add_model", "policy", "parameters"])
def test_without_a_seam_vllms_own_policy_stays_and_the_log_says_what_is_missing(gone, monkeypatch, caplog):
    if gone == "parameters":
        monkeypatch.setattr(EplbState, "rearrange", lambda self, step: None)
    elif gone == "policy":
        monkeypatch.delattr(policies, "AbstractEplbPolicy")
    else:
        monkeypatch.delattr(EplbState, gone)
    state = state_with({"eplb_plugin": {"enabled": True}})
    assert "add_model" not in vars(state)
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    said = record.getMessage()
    assert ("AbstractEplbPolicy" if gone == "policy" else gone.replace("parameters", "is_profile")) in said
    assert "0.32" in said


@pytest.mark.parametrize("gone", ["expert_load_window", "rebalanced", "num_logical_experts"])
def test_a_model_without_what_is_read_leaves_vllm_its_own_policy(gone, monkeypatch, caplog):
    group = SimpleNamespace(rank_in_group=0, world_size=2, ranks=[0, 1])
    monkeypatch.setattr("vllm.distributed.parallel_state.get_ep_group", lambda: group)
    counts = {
        "num_moe_layers": 2,
        "num_logical_experts": 4,
        "num_physical_experts": 6,
        "num_expert_groups": 1,
    }
    fields = {
        "expert_load_window": torch.zeros(3, 2, 6),
        "physical_to_logical_map": torch.zeros(2, 6),
        "model_name": "tiny",
        "rebalanced": False,
    }
    for names in (counts, fields):
        names.pop(gone, None)

    def add_model(state):
        state.policy = policies.DefaultEplbPolicy
        state.model_states["model"] = SimpleNamespace(model=SimpleNamespace(**counts), **fields)

    monkeypatch.setattr(EplbState, "add_model", add_model)
    state = state_with({"eplb_plugin": {"enabled": True}})
    state.add_model()
    state.add_model()
    assert state.policy is policies.DefaultEplbPolicy
    assert not {"rearrange", "step"} & set(vars(state))
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert f".{gone}. vLLM's own policy plans instead" in record.getMessage()


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


def test_workers_on_ray_get_the_variables(monkeypatch):
    from vllm.ray.ray_env import get_env_vars_to_copy

    monkeypatch.setenv("VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY", "MINE_")
    monkeypatch.setenv("EPLB_PLUGIN_PLANNER__MIN_GAIN", "0.003")
    monkeypatch.setenv("MINE_TOO", "1")
    vllm_plugin.register()
    vllm_plugin.register()
    assert {"EPLB_PLUGIN_PLANNER__MIN_GAIN", "MINE_TOO"} <= get_env_vars_to_copy()


def test_an_untested_release_is_warned_of(monkeypatch, caplog):
    import vllm

    monkeypatch.setattr(vllm, "__version__", "0.47.1")
    state = state_with({"eplb_plugin": {"enabled": True}})
    assert "add_model" in vars(state), "a warning, not a refusal"
    assert "tested with vLLM 0.32, not 0.47.1" in caplog.text


def test_vllms_tables_of_our_maps_are_ours():
    """vLLM derives its dispatch tables from the map itself; they agree with those of `Placement`."""
    from vllm.distributed.eplb.eplb_state import compute_logical_maps

    ids = eplb.plan(torch.rand(3, 16), eplb.Topology(num_ranks=4, num_slots=20)).placement
    tables, counts = compute_logical_maps(ids.physical_to_logical, 16)
    assert torch.equal(tables, ids.logical_to_physical)
    assert torch.equal(counts, ids.replica_count)


@pytest.fixture
def balanced_dispatch():
    """Binds dispatch `balanced` in this process, for a placement of one layer on two ranks."""
    from vllm.config import ParallelConfig
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    for owner, names in (
        (ParallelConfig, ("enable_elastic_ep", "enable_fault_tolerance", "tensor_parallel_size")),
        (ParallelConfig, ("use_ubatching",)),
        (FusedMoEConfig, ("dp_size", "pcp_size", "is_sequence_parallel")),
        (MoERunner, ("do_naive_dispatch_combine", "is_monolithic")),
    ):
        for name in names:
            fields = getattr(owner, "__dataclass_fields__", ())
            assert hasattr(owner, name) or name in fields, (owner, name)

    def bind(placement):
        layer = SimpleNamespace(
            is_monolithic=False,
            do_naive_dispatch_combine=False,
            moe_config=SimpleNamespace(dp_size=1, pcp_size=1, is_sequence_parallel=False),
        )
        model = SimpleNamespace(
            moe_layers=[layer],
            num_logical_experts=placement.num_logical,
            num_physical_experts=placement.num_slots,
            expert_weights=[[torch.rand(placement.num_slots // 2, 3)]],
        )
        state = EplbState(SimpleNamespace(), torch.device("cpu"))
        state.parallel_config = SimpleNamespace(
            tensor_parallel_size=2, enable_elastic_ep=False, use_ubatching=False, enable_fault_tolerance=False
        )
        table = placement.logical_to_physical
        state.model_states["model"] = SimpleNamespace(model=model, logical_to_physical_map=table)
        group = SimpleNamespace(rank_in_group=0, world_size=2, ranks=[0, 1])
        bind_dispatch(state, EngineOptions(dispatch="balanced"), group)

    yield bind
    restore_mapping()


def test_routers_and_models_map_as_we_do(balanced_dispatch):
    from vllm.distributed.eplb.eplb_state import EplbLayerState
    from vllm.model_executor.layers.fused_moe.router import base_router
    from vllm.models.deepseek_v4.nvidia import model as imported_before

    own = base_router.eplb_map_to_physical_and_record
    assert imported_before.eplb_map_to_physical_and_record is own
    topology = eplb.Topology(num_ranks=2, num_slots=20)
    placement = eplb.plan(torch.rand(1, 16) ** 3, topology).placement
    balanced_dispatch(placement)
    from vllm.models.kimi_k3.nvidia import model as imported_later

    modules = (base_router, imported_before, imported_later)
    assert all(isinstance(module.eplb_map_to_physical_and_record, BalancedMapping) for module in modules)

    layer = EplbLayerState(
        expert_load_view=torch.zeros(20, dtype=torch.int32),
        logical_to_physical_map=placement.logical_to_physical[0],
        logical_replica_count=placement.replica_count[0],
        should_record_tensor=torch.tensor(True),
        num_unpadded_tokens_tensors=[torch.tensor(50, dtype=torch.int32)],
    )
    ids = (torch.rand(50, 4) ** 2 * 16).int()
    slots = base_router.BaseRouter._apply_eplb_mapping(SimpleNamespace(eplb_state=layer), ids)
    counts = torch.bincount(ids.flatten(), minlength=16)
    wanted = eplb.balance_batch(counts[None], placement, topology)[0]
    assert torch.equal(torch.bincount(slots.flatten(), minlength=20), wanted)

    # The next engine of this process has options of its own.
    state_with({"eplb_plugin": {"enabled": True}})
    assert all(module.eplb_map_to_physical_and_record is own for module in modules)
