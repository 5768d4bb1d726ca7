"""The entry point in vLLM's own classes, without an engine: when it acts, when it refuses or stays out."""

import logging
from types import SimpleNamespace

import pytest
import torch
import yaml
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

from .bare_state import state_with

pytestmark = pytest.mark.usefixtures("registered")


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
