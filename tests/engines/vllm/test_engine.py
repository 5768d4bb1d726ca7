"""The real engine on several ranks: tokens and weights stay right while our planner rearranges experts."""

import re

import pytest
import yaml

from .conftest import BALANCED, LIMIT, drive, drive_together, eplb_arguments, llm_arguments
from .prompts import NEW_TOKENS
from .step_loads import read_steps, wrong_steps

pytestmark = pytest.mark.timeout(2 * LIMIT)

# The slow one first: a plan that is still under way when a step ends may fail in the next one.
FAULTS = ("slow", "raises", "wrong", "differs")
OURS = re.compile(r"^.*\] (?:eplb_plugin|rebalance \d+ of ).*$", re.MULTILINE)
EVERY = {"traffic": True, "report": True}
STEPS = [
    {"name": "serving", "before": [["watch"]], "rounds": 4, **EVERY},
    *(
        {
            "name": how,
            "before": [*([["mend_planner"]] if n else []), ["break_planner", how]],
            "rounds": 1,
            "until_failures": how != "slow",
            **EVERY,
        }
        for n, how in enumerate(FAULTS)
    ),
    {"name": "mended", "before": [["mend_planner"]], "rounds": 1, **EVERY},
    # The engine is wrong from here on.
    {"name": "other splits", "before": [["split_by_cost", 2**20]], "rounds": 1},
    {"name": "control", "before": [["split_by_cost", 0], ["commit_without_moving"]], "rounds": 1},
]


@pytest.fixture(scope="module", params=["sync", "async"])
def served(request, model, tmp_path_factory):
    """Two ranks through all steps; the asynchronous engine is configured by a file."""
    folder = tmp_path_factory.mktemp(request.param)
    use_async = request.param == "async"
    arguments = llm_arguments(model, 2, **eplb_arguments(use_async=use_async))
    env = {}
    if use_async:
        (folder / "config.yaml").write_text(yaml.safe_dump({"eplb_plugin": BALANCED}))
        env["EPLB_PLUGIN_CONFIG"] = str(folder / "config.yaml")
    else:
        arguments["additional_config"] = {"eplb_plugin": BALANCED}
    scenario = {"llm": arguments, "steps": STEPS, "watched": str(folder)}
    return drive(folder, scenario, 2, **env) | {"folder": folder}


def reports(step):
    """Failures and reports of each rank."""
    return [next(iter(rank["models"].values())) for rank in step["report"]]


def test_tokens_and_weights_stay_right(served, expected):
    step = served["steps"]["serving"]
    assert all(tokens == expected for tokens in step["rounds"])
    for rank, checks in enumerate(step["checks"]):
        assert checks["wrong"] == []
        assert checks["changes"] >= 15, f"rank {rank}: {checks}"
        assert checks["rows"] > checks["changes"]
    assert [rank["failures"] for rank in reports(step)] == [0, 0]


def test_at_least_fifteen_rearrangements_moved_experts(served):
    for rank in reports(served["steps"]["serving"]):
        assert sum(not report["skipped"] for report in rank["reports"]) >= 15
        assert all(report["moves"] > 0 for report in rank["reports"] if not report["skipped"])


def test_every_slot_gets_the_tokens_that_the_split_says(served):
    steps = served["steps"]
    loads, maps = read_steps(served["folder"], steps["mended"]["counted"])
    assert len(loads) >= 100
    assert wrong_steps(loads, maps, sharded=False) == []
    assert len(maps.unique(dim=0)) > 15


def test_the_checks_see_ranks_that_split_differently(served, expected):
    steps = served["steps"]
    assert steps["other splits"]["rounds"][0] != expected
    first, end = steps["mended"]["counted"], steps["other splits"]["counted"]
    assert wrong_steps(*read_steps(served["folder"], end, first), sharded=False) != []


def test_all_ranks_report_the_same_plans(served):
    first, second = reports(served["steps"]["mended"])
    plans = [
        [{key: value for key, value in report.items() if key != "plan_seconds"} for report in rank["reports"]]
        for rank in (first, second)
    ]
    assert len(plans[0]) > 15
    # On ranks that fail apart, what they planned differs; what happened then does not.
    happened = [[(report["number"], report["skipped"], report["moves"]) for report in rank] for rank in plans]
    # When asked, a rank may still have been busy with the last plan that the other has reported.
    both = min(map(len, happened))
    assert happened[0][:both] == happened[1][:both]
    assert max(map(len, happened)) - both <= 1


@pytest.mark.parametrize("how", FAULTS)
def test_serving_goes_on_when_the_planner_is_broken(served, expected, how):
    step = served["steps"][how]
    assert all(tokens == expected for tokens in step["rounds"])
    before = served["steps"][(["serving", *FAULTS])[FAULTS.index(how)]]
    for then, now, old, new in zip(
        reports(before), reports(step), before["checks"], step["checks"], strict=True
    ):
        assert new["wrong"] == []
        assert new["calls"] > old["calls"], "vLLM no longer asks for plans"
        if how == "slow":
            assert now["failures"] == then["failures"]
        else:
            assert now["failures"] > then["failures"]


def test_failures_are_logged_once_with_their_cause(served):
    errors = [
        line for line in served["log"].splitlines() if " ERROR " in line and "this is said once" in line
    ]
    for cause in ("RuntimeError: the planner broke", "PlacementError: ", "AgreementError: ranks planned"):
        by_rank = [sum(cause in line and f"_EP{rank} " in line for line in errors) for rank in range(2)]
        assert by_rank == [1, 1], (cause, errors)


def test_a_mended_planner_moves_experts_again(served, expected):
    step = served["steps"]["mended"]
    assert all(tokens == expected for tokens in step["rounds"])
    for old, new in zip(served["steps"][FAULTS[-1]]["checks"], step["checks"], strict=True):
        assert new["changes"] > old["changes"]
        assert new["wrong"] == []


def test_the_checks_see_a_map_that_the_weights_do_not_follow(served, expected):
    step = served["steps"]["control"]
    assert step["rounds"][0] != expected
    assert all(len(checks["wrong"]) > 0 for checks in step["checks"])


def test_it_says_what_it_does(served):
    """One line when it is set up, one for each rebalance, on the first rank only."""
    ours = OURS.findall(served["log"])
    (activation,) = [line for line in ours if "in vLLM 0.32" in line]
    assert '"move_price":0.0' in activation
    assert "4 layers, 16 experts, 20 slots, 2 ranks" in activation
    (dispatch,) = [line for line in ours if "dispatch=balanced" in line]
    assert "tokens are replicated, no message" in dispatch
    lines = [line for line in ours if "balancedness" in line and "predicted" in line]
    moved = sum(not report["skipped"] for report in reports(served["steps"]["mended"])[0]["reports"])
    assert len(lines) >= min(moved, 15)
    assert all("EP0" in line for line in lines)
    assert "do not move with the experts" not in served["log"]
    assert "could not be checked" not in served["log"]


def test_four_ranks(model, expected, tmp_path):
    """One engine for both modes: asynchronous rearrangements first, synchronous ones after them."""
    arguments = llm_arguments(model, 4, **eplb_arguments(use_async=True))
    arguments["additional_config"] = {"eplb_plugin": BALANCED | {"expert_cost": 4}}
    interval = arguments["eplb_config"]["step_interval"]
    steps = [
        {"name": "async", "before": [["watch"]], "rounds": 3, **EVERY},
        # Whatever was under way ends.
        {"name": "at rest", "before": [["rearrange_every", 2**30]], "rounds": 1},
        {
            "name": "sync",
            "before": [["go_on_in_sync_mode"], ["rearrange_every", interval]],
            "rounds": 2,
            **EVERY,
        },
    ]
    result = drive(tmp_path, {"llm": arguments, "steps": steps, "watched": str(tmp_path)}, 4)
    before = [0] * 4
    for name, step in result["steps"].items():
        assert all(tokens == expected for tokens in step["rounds"]), name
        assert [checks["wrong"] for checks in step["checks"]] == [[]] * 4
        changes = [checks["changes"] for checks in step["checks"]]
        if name != "at rest":
            assert min(now - then for then, now in zip(before, changes, strict=True)) >= 10, name
            assert [rank["failures"] for rank in reports(step)] == [0] * 4
        before = changes
    loads, maps = read_steps(tmp_path)
    assert loads.shape[:2] >= (50, 4)
    assert wrong_steps(loads, maps, sharded=False, expert_cost=4) == []
    assert wrong_steps(loads, maps, sharded=False) != [], "the cost made no difference"


def test_two_data_parallel_ranks(model, expected, tmp_path):
    """Synchronous. The second rank has less to do, and takes part with dummy batches then."""
    arguments = llm_arguments(model, **eplb_arguments(use_async=False))
    arguments |= {
        "all2all_backend": "allgather_reducescatter",
        "additional_config": {"eplb_plugin": BALANCED},
    }
    steps = [{"name": "serving", "before": [["watch"]], "rounds": 3, **EVERY}]
    scenario = {"llm": arguments, "steps": steps, "watched": str(tmp_path)}
    results = drive_together(tmp_path, [scenario, scenario | {"new_tokens": NEW_TOKENS // 2}])
    for result, length in zip(results, (NEW_TOKENS, NEW_TOKENS // 2), strict=True):
        step = result["steps"]["serving"]
        assert step["rounds"] == [[tokens[:length] for tokens in expected]] * 3
        assert reports(step)[0]["failures"] == 0
    for checks in results[0]["steps"]["serving"]["checks"]:
        assert checks["wrong"] == []
        assert checks["changes"] >= 10
    assert "tokens are sharded, one all-gather of 128 bytes a rank" in results[0]["log"]
    loads, maps = read_steps(tmp_path)
    assert len(loads) >= 50
    assert wrong_steps(loads, maps, sharded=True) == []
    # No rank's own tokens would have given these loads.
    assert all(wrong_steps(loads[:, [rank, rank]], maps, sharded=False) for rank in range(2))


def test_without_being_enabled_it_is_absent(model, expected, tmp_path):
    arguments = llm_arguments(model, 2, **eplb_arguments(use_async=False))
    arguments["additional_config"] = {"eplb_plugin": {"enabled": False, "history": 2}}
    steps = [{"name": "serving", "before": [["watch"], ["describe_policy"]], "rounds": 2, "traffic": True}]
    result = drive(tmp_path, {"llm": arguments, "steps": steps, "watched": str(tmp_path)}, 2)
    absent = {
        "policy": "vllm.distributed.eplb.policy.default.DefaultEplbPolicy",
        "bound": [],
        "report": False,
    }
    assert result["describe_policy"] == [absent, absent]
    assert all(tokens == expected for tokens in result["steps"]["serving"]["rounds"])
    assert all(
        checks["changes"] > 0 and not checks["wrong"] for checks in result["steps"]["serving"]["checks"]
    )
    assert not OURS.search(result["log"])
