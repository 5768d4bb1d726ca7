"""Dispatch `balanced` in the real engine: tokens stay right, and slots get what `balance_batch` says."""

from __future__ import annotations

import json

import pytest
import torch

import eplb_plugin as eplb
from tests.engines.sglang.engine_process import SMALL_ENGINE, run
from tests.engines.sglang.setups import Setup
from tests.engines.sglang.tiny_model import EXPERTS, LAYERS, NEW_TOKENS
from tests.processes import RanksFailedError, run_ranks

INTERVAL = 10
SLOTS = 24
TOPOLOGY = eplb.Topology(num_ranks=2, num_slots=SLOTS)
ROUNDS = [NEW_TOKENS] * 6


@pytest.mark.timeout(600)
def test_the_engine_splits_each_batch_and_its_tokens_stay_right(tiny, tmp_path):
    result, folder = tmp_path / "rounds.json", tmp_path / "steps"
    folder.mkdir()
    arguments = {
        "model_path": str(tiny.path),
        **SMALL_ENGINE,
        "tp_size": 2,
        "ep_size": 2,
        "log_level": "info",
        "enable_eplb": True,
        "eplb_algorithm": "eplb_plugin:dispatch=balanced,expert_cost=3,move_price=0.005",
        "eplb_rebalance_num_iterations": INTERVAL,
        "ep_num_redundant_experts": SLOTS - EXPERTS,
    }
    # Plans for the even split move experts, which those for this dispatch need not.
    env = {"EPLB_PLUGIN_PLANNER__DISPATCH": "even"}
    engine = run(serve, arguments, tiny.prompts, ROUNDS, result, folder, log=tmp_path / "engine.log", env=env)
    assert result.exists(), engine.tail()
    assert "dispatch=balanced: every rank has all tokens, expert_cost=3" in engine.text()
    assert len(engine.rebalances()) >= 10, engine.tail()
    assert sum(moves > 0 for moves, _ in engine.rebalances()) >= 3

    # Equal to what transformers decodes, until one rank splits otherwise: then the tokens are wrong.
    *rounds, last = json.loads(result.read_text())
    assert rounds == [tiny.tokens] * (len(ROUNDS) - 1)
    assert last != tiny.tokens

    steps = [[json.loads(line) for line in (folder / str(rank)).open()] for rank in range(2)]
    assert len(steps[0]) >= sum(ROUNDS)
    assert steps[0] == steps[1]
    uneven = 0
    for counted, placed, _ in steps[0]:
        slots, placement = torch.tensor(counted), eplb.Placement(torch.tensor(placed), EXPERTS)
        counts = torch.zeros(LAYERS, EXPERTS, dtype=torch.int64)
        counts.scatter_add_(1, placement.physical_to_logical, slots)
        assert torch.equal(slots, eplb.balance_batch(counts, placement, TOPOLOGY, expert_cost=3))
        of_expert = slots.gather(1, placement.logical_to_physical.clamp(min=0).flatten(1))
        most = of_expert.view(LAYERS, EXPERTS, -1).max(2).values
        uneven += bool((most > counts // placement.replica_count + 1).any())
    assert uneven > 10


def serve(*arguments):
    from tests.engines.sglang import drive

    drive.generate_counting_slots(*arguments)


def split(rank, setup, costs):
    from tests.engines.sglang import dispatch_ranks

    return dispatch_ranks.split(rank, setup, costs)


def setup_for(backend):
    return Setup(
        algorithm="eplb_plugin:dispatch=balanced,expert_cost=auto,move_price=0.002",
        backend=backend,
        own_tokens=backend != "none",
        layers_per_chunk=1,
        rebalances=4,
    )


@pytest.mark.parametrize("backend", ["none", "flashinfer"])
def test_ranks_split_batches_through_rebalances(backend):
    outcomes = run_ranks(split, 2, setup_for(backend), (2, 2), timeout=180)
    for outcome in outcomes:
        assert outcome.tokens > 0
        assert outcome.wrong_tokens == outcome.wrong_slots == outcome.wrong_rows == outcome.failures == 0
        assert outcome.moves > 0
    if backend == "none":
        assert outcomes[0].chosen == outcomes[1].chosen


@pytest.mark.parametrize("backend", ["none", "flashinfer"])
def test_ranks_with_another_cost_do_not_serve(backend):
    with pytest.raises(RanksFailedError, match="expert_cost=3 on rank 1, here expert_cost=2") as caught:
        run_ranks(split, 2, setup_for(backend), (2, 3), timeout=180)
    assert all("AgreementError" in text for text in caught.value.failures.values())


def start(rank, setup, broken):
    from tests.engines.sglang import dispatch_ranks

    dispatch_ranks.start(rank, setup, broken)


@pytest.mark.parametrize(
    ("backend", "broken", "message"),
    [
        ("none", "allgather", "before SGLang's FP4 all-gather; give --disable-flashinfer-cutlass-moe-fp4"),
        ("flashinfer", "hook", "flashinfer: SGLang made its own solvers"),
    ],
)
def test_what_only_ranks_can_see_is_refused_there(backend, broken, message):
    with pytest.raises(RanksFailedError, match=f"ConfigError: .*{message}"):
        run_ranks(start, 2, setup_for(backend), broken, timeout=180)


def static(rank, setup):
    from tests.engines.sglang import dispatch_ranks

    return dispatch_ranks.static(rank, setup)


@pytest.mark.parametrize(
    ("option", "table"),
    [("", "fair"), (":dispatch=engine", "engine"), (":mode=observe", "engine")],
    ids=["fair", "engine", "observe"],
)
def test_reports_of_static_dispatch_are_what_slots_get(option, table):
    """On four ranks and two nodes, three replicas cannot serve equally many ranks."""
    setup = Setup(
        algorithm=f"eplb_plugin{option}",
        backend="flashinfer",
        dispatch="static",
        own_tokens=False,
        logical=16,
        redundant=8,
        nodes=2,
        rebalances=6,
    )
    outcomes = run_ranks(static, 4, setup, timeout=180)
    for outcome in outcomes:
        assert outcome.wrong_tokens == outcome.failures == 0
        assert outcome.table == table
        assert (outcome.moves == 0) == (option == ":mode=observe")
        assert outcome.reported == pytest.approx(outcome.counted, abs=1e-9)
        assert outcome.far == 0 < outcome.near
        # At the start, an expert has at most one replica on each of the two nodes.
        assert (outcome.counted == outcome.even) == (outcome.moves == 0)
    if option == ":mode=observe":
        return
    # From the first rebalance on, the maps are planned.
    counted, even = (sum(values[1:]) for values in (outcomes[0].counted, outcomes[0].even))
    assert counted > even - 0.1
