"""What the plugin does to SGLang itself: what it refuses at launch, what it leaves alone, what it misses."""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from eplb_plugin import ConfigError
from eplb_plugin.integration.sglang import plugin as sglang_plugin
from eplb_plugin.integration.sglang.policy import SglangBalancer
from eplb_plugin.integration.sglang.seams import missing_seams, warn_unmoved


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


def test_a_recorded_load_is_planned_from_at_start():
    """`--init-expert-location COUNTS` with our algorithm: there is no map in force yet."""
    from sglang.srt.eplb import eplb_algorithms
    from sglang.srt.eplb.expert_location import get_global_expert_location_metadata

    assert get_global_expert_location_metadata() is None
    algorithm = eplb_algorithms.compute_algorithm(raw_algorithm="eplb_plugin", num_groups=None, num_nodes=1)
    assert isinstance(algorithm, SglangBalancer)
    assert eplb_algorithms.compute_algorithm("eplb_plugin", None, 1) is algorithm
    assert isinstance(eplb_algorithms.compute_algorithm("ensemble", None, 1), SglangBalancer)
    counts = torch.zeros(1, 2, 8, dtype=torch.int64)
    counts[0, 1] = torch.tensor([50, 1, 1, 1, 1, 1, 1, 50])
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
    warn_unmoved(manager)
    assert ours() == []
    for block in blocks[1:]:
        # As SGLang keeps padded scales for one of its kernels.
        block.experts.hpc_ops_w13_weight_scale = torch.rand(5, 8)
    warn_unmoved(manager)
    (said,) = ours()
    assert said.endswith(": layers 3-4: hpc_ops_w13_weight_scale (5, 8) float32")
    warn_unmoved(SimpleNamespace())
    assert "could not be checked; it goes on" in ours()[-1]
