"""The policy as vLLM calls it, without vLLM: whatever happens, a valid map comes back."""

from __future__ import annotations

import logging

import pytest
import torch

import eplb_plugin as eplb
from eplb_plugin.formats.recordings import read_recording, recorded_files
from eplb_plugin.integration.common.options import EngineOptions
from eplb_plugin.integration.vllm.policy import Interval, RecordedModel, VllmPolicy
from eplb_plugin.runtime.control.rank_group import RankGroup

from .processes import run_ranks

LAYERS, LOGICAL, SLOTS, RANKS = 3, 8, 12, 4
NUMBERS = (SLOTS, 1, 1, RANKS)


class Own:
    """What vLLM's own policy is here: it counts its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []

    def rebalance_experts(self, weight, *numbers_and_map):
        self.calls.append((weight, *numbers_and_map))
        if numbers_and_map[0] % numbers_and_map[3]:
            raise AssertionError("slots do not divide")
        return torch.full((weight.shape[0], numbers_and_map[0]), 7)


def in_force() -> torch.Tensor:
    return eplb.Placement.default(LAYERS, LOGICAL, SLOTS).physical_to_logical.clone()


def skewed(seed: int = 0, snapshots: int = 4) -> torch.Tensor:
    """int64 [snapshots, layers, logical]: the first experts are hot."""
    generator = torch.Generator().manual_seed(seed)
    heat = torch.tensor([40, 30, 20, 10, 1, 1, 1, 1])
    return heat * torch.randint(1, 5, (snapshots, LAYERS, LOGICAL), generator=generator)


def policy(**options) -> VllmPolicy:
    return VllmPolicy(EngineOptions(check_agreement=False, **options), Own())


def call(policy: VllmPolicy, load: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """One rearrangement of one model, as vLLM makes it."""
    policy.expect([Interval("moe", load)])
    return policy.rebalance_experts(load.sum(0), *NUMBERS, old)


def test_it_returns_what_the_planner_plans_and_writes_to_nothing():
    load, old = skewed(), in_force()
    given_load, given_old = load.clone(), old.clone()
    new = call(policy(), load, old)
    topology = eplb.Topology(num_ranks=RANKS, num_slots=SLOTS)
    expected = eplb.plan(load, topology, given_old).placement.physical_to_logical
    assert torch.equal(new, expected)
    assert not torch.equal(new, old)
    assert torch.equal(load, given_load)
    assert torch.equal(old, given_old)
    # vLLM writes into maps; that must not reach what we keep, nor what we were given.
    new.zero_()
    assert torch.equal(old, given_old)


def test_experts_that_stay_on_a_rank_keep_their_slot():
    load, old = skewed(), in_force()
    new = call(policy(), load, old)
    per_rank = SLOTS // RANKS
    for layer in range(LAYERS):
        for rank in range(RANKS):
            before = old[layer, rank * per_rank :][:per_rank].tolist()
            after = new[layer, rank * per_rank :][:per_rank].tolist()
            for expert in set(before) & set(after):
                assert after[before.index(expert)] == expert


def test_history_goes_into_the_next_plan_and_scaling_drops_it():
    remembering, forgetting = policy(), policy()
    for one in (remembering, forgetting):
        call(one, skewed(), in_force())
    forgetting.expect_scaling()
    second = torch.roll(skewed(1), 4, 2)
    after = [call(one, second, in_force()) for one in (remembering, forgetting)]
    assert torch.equal(after[1], call(policy(), second, in_force()))
    assert not torch.equal(after[0], after[1])


def test_the_calls_of_a_scaling_group_go_to_vllms_own_policy():
    ours = policy()
    ours.expect_scaling()
    weight = skewed().sum(0)
    assert bool((ours.rebalance_experts(weight, 8, 1, 1, 2, in_force()) == 7).all())
    ours.expect([])
    # Fewer slots than the map has, or slots without an expert, are scaling too.
    ours.rebalance_experts(weight, 8, 1, 1, 2, in_force())
    ours.rebalance_experts(weight, *NUMBERS, in_force().index_fill(1, torch.tensor([3]), -1))
    assert len(ours.own.calls) == 3
    assert ours.planners == {}


def test_profiling_keeps_the_map_and_leaves_no_trace():
    ours = policy()
    ours.expect_profiling()
    old = in_force()
    new = ours.rebalance_experts(torch.ones(LAYERS, LOGICAL, dtype=torch.int64), *NUMBERS, old)
    assert torch.equal(new, old)
    assert new.data_ptr() != old.data_ptr()
    assert ours.planners == {}


def test_an_interval_without_load_keeps_the_map_whatever_the_history(caplog):
    ours = policy(planner={"min_gain": 0.0, "move_price": 0.0})
    call(ours, skewed(), in_force())
    with caplog.at_level(logging.INFO):
        assert torch.equal(call(ours, torch.zeros_like(skewed()), in_force()), in_force())
    assert ours.planners["moe"].reports[-1].moves == 0
    assert ours.planners["moe"].failures == 0
    assert "rebalance 2 of moe: skipped, no load was seen" in caplog.text


def test_a_rearrangement_that_gains_too_little_is_skipped(caplog):
    planned = call(policy(), skewed(), in_force())
    ours = policy(planner={"min_gain": 0.3})
    with caplog.at_level(logging.INFO):
        assert torch.equal(call(ours, skewed(), planned), planned)
    assert "no layer gains min_gain=0.3" in caplog.text
    assert ours.planners["moe"].reports[-1].skipped


def test_models_are_told_apart_by_their_order():
    ours = policy()
    other = torch.roll(skewed(), 4, 2)
    ours.expect([Interval("main", skewed()), Interval("draft", other)])
    main = ours.rebalance_experts(skewed().sum(0), *NUMBERS, in_force())
    draft = ours.rebalance_experts(other.sum(0), *NUMBERS, in_force())
    assert torch.equal(main, call(policy(), skewed(), in_force()))
    assert torch.equal(draft, call(policy(), other, in_force()))
    assert set(ours.report()["models"]) == {"main", "draft"}


@pytest.mark.parametrize(
    "broken",
    [
        Interval("moe", skewed(), error=RuntimeError("no memory for the window")),
        Interval("moe", skewed(), failures=torch.tensor([1])),
        Interval("moe", -skewed()),
        Interval("moe", skewed()[:, :2]),
        Interval("moe", skewed(), ready=lambda: 1 / 0),
    ],
    ids=["no load", "no load elsewhere", "negative", "another model's layers", "never arrives"],
)
def test_what_goes_wrong_before_planning_keeps_the_map_and_is_counted(broken, caplog):
    ours = policy()
    first = call(ours, skewed(), in_force())
    for _ in range(2):
        ours.expect([broken])
        assert torch.equal(ours.rebalance_experts(skewed().sum(0), *NUMBERS, first), first)
    assert ours.planners["moe"].failures == 2
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 1, "a failure is said once"
    assert errors[0].exc_info
    # The next good interval is planned from again.
    assert not torch.equal(call(ours, torch.roll(skewed(1), 4, 2) * 100, first), first)


def test_numbers_that_do_not_fit_keep_the_map():
    ours = policy()
    ours.expect([Interval("moe", skewed())])
    assert torch.equal(ours.rebalance_experts(skewed().sum(0), SLOTS, 1, 1, 5, in_force()), in_force())
    assert ours.planners["moe"].failures == 1


def test_without_a_map_in_force_it_plans_from_the_summed_load():
    """The cases that vLLM tests its own policy with, by what has to hold for any policy."""
    for weight, slots, groups, nodes, ranks in (
        ([[10, 20, 30, 40]], 4, 1, 1, 1),
        ([[50] * 8], 8, 2, 2, 4),
        ([[1000, 1, 1, 1, 1, 1, 1, 1]], 12, 2, 2, 4),
        ([[10, 20, 30, 40, 50, 60], [60, 50, 40, 30, 20, 10], [25] * 6], 8, 2, 2, 4),
        ([[10, 20, 30, 40]], 8, 3, 2, 4),
    ):
        load = torch.tensor(weight)
        ids = policy().rebalance_experts(load, slots, groups, nodes, ranks)
        placement = eplb.Placement(ids, load.shape[1])
        assert ids.shape == (len(weight), slots)
        placement.validate(eplb.Topology(num_nodes=nodes, num_ranks=ranks, num_slots=slots))
        hottest = load.argmax(1)
        if slots > load.shape[1]:
            most = placement.replica_count.amax(1)
            assert torch.equal(placement.replica_count.gather(1, hottest[:, None]).flatten(), most)
    # What cannot be planned is vLLM's to refuse, in its own way.
    ours = policy()
    with pytest.raises(AssertionError, match="slots do not divide"):
        ours.rebalance_experts(torch.tensor([[10, 20, 30, 40]]), 7, 2, 2, 4)
    assert len(ours.own.calls) == 1


def _rearrange_on(rank: int, fault: str) -> tuple[list[int], list[int], int, str]:
    """Two rearrangements: one in which rank 1 goes astray, and a good one."""
    ours = VllmPolicy(EngineOptions(), Own(), lambda: RankGroup(None, "cpu"))
    old, load = in_force(), skewed()
    if fault == "raises" and rank == 1:
        load_here = Interval("moe", load, error=RuntimeError("only here"))
    elif fault == "differs" and rank == 1:
        load_here = Interval("moe", torch.roll(load, 4, 2))
    else:
        load_here = Interval("moe", load)
    ours.expect([load_here])
    first = ours.rebalance_experts(load.sum(0), *NUMBERS, old)
    kept = torch.equal(first, old)
    reason = ours.planners["moe"].reports[-1].reason if ours.planners["moe"].reports else ""
    ours.expect_scaling()  # drops what rank 1 alone has seen
    second = call(ours, load, first)
    return (
        second.flatten().tolist(),
        first.flatten().tolist(),
        ours.planners["moe"].failures,
        f"{kept} {reason}",
    )


@pytest.mark.parametrize("fault", ["none", "raises", "differs"])
def test_ranks_that_disagree_all_keep_the_map_in_force(fault):
    ranks = run_ranks(_rearrange_on, 2, fault)
    assert ranks[0][0] == ranks[1][0] != in_force().flatten().tolist()
    assert ranks[0][1] == ranks[1][1]
    for _, first, failures, _ in ranks:
        if fault == "none":
            assert failures == 0
            assert first != in_force().flatten().tolist()
        else:
            assert failures >= 1
            assert first == in_force().flatten().tolist()
    if fault != "none":
        assert "ranks planned different maps: one on ranks [0], another on ranks [1]" in ranks[0][3]


def test_observing_keeps_the_map_and_records_each_model_in_its_folder(tmp_path):
    ours = policy(mode="observe", record=str(tmp_path / "here"))
    ours.know("moe", RecordedModel((1, 3, 4), 2, ""))
    ours.know("draft", RecordedModel((), 1, "draft"))
    load, old = skewed(), in_force()
    for model in ("moe", "draft"):
        ours.expect([Interval(model, 2 * load, steps=40, step_seconds=0.25)])
        assert torch.equal(ours.rebalance_experts(load.sum(0), *NUMBERS, old), old)
    # Without a map in force there is nothing to keep: vLLM's own policy answers.
    ours.rebalance_experts(load.sum(0), *NUMBERS, None)
    assert len(ours.own.calls) == 1
    assert ours.record_to(None) is None
    read = {name: read_recording(tmp_path / "here" / name) for name in ("", "draft")}
    assert torch.equal(read[""].trace.load, load)
    assert torch.equal(read["draft"].trace.load, 2 * load)
    assert read[""].newest.layer_ids == (1, 3, 4)
    assert (read[""].newest.steps, read[""].newest.step_seconds) == (40, 0.25)
    # Stopped, and begun elsewhere.
    call(ours, load, old)
    assert ours.report()["models"]["moe"]["recorded"] is None
    assert ours.record_to(str(tmp_path / "there")) == str(tmp_path / "there")
    call(ours, load, old)
    assert ours.report()["models"]["moe"]["recorded"]["folder"] == str(tmp_path / "there")
    ours.record_to(None)
    assert len(recorded_files(tmp_path / "here")) == len(recorded_files(tmp_path / "there")) == 1


def test_only_the_first_rank_records(tmp_path):
    other = VllmPolicy(EngineOptions(check_agreement=False, record=str(tmp_path / "no")), Own(), speaks=False)
    other.know("moe", RecordedModel((), 1, ""))
    call(other, skewed(), in_force())
    assert other.record_to(str(tmp_path / "no")) is None
    assert not (tmp_path / "no").exists()
