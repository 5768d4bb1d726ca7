"""The real engine on two ranks: it starts from a plan of ours, rebalances live, and its tokens stay right."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from eplb_plugin.core.topology import Topology
from eplb_plugin.formats.npz import save_load_trace
from eplb_plugin.formats.recordings import read_recording
from eplb_plugin.offline.synthetic_traffic import TrafficProfile, generate
from tests.engines.sglang.engine_process import SMALL_ENGINE, run
from tests.engines.sglang.tiny_model import EXPERTS, LAYERS, NEW_TOKENS

INTERVAL = 10
SLOTS = 24
TOP_K = 4
# The first round ends before the first rebalance is due; the others bring at least two each.
ROUNDS = [INTERVAL - 3] + [NEW_TOKENS] * 6


@pytest.mark.timeout(600)
def test_tokens_are_equal_before_between_and_after_live_rebalances(tiny, tmp_path):
    planned, result = plan_offline(tmp_path), tmp_path / "rounds.json"
    arguments = {
        "model_path": str(tiny.path),
        **SMALL_ENGINE,
        "tp_size": 2,
        "ep_size": 2,
        "log_level": "info",
        "enable_eplb": True,
        "eplb_algorithm": f"eplb_plugin:history=2,move_price=0.005,record={tmp_path / 'recorded'}",
        "eplb_rebalance_num_iterations": INTERVAL,
        "ep_num_redundant_experts": SLOTS - EXPERTS,
        "init_expert_location": str(planned),
    }
    env = {"SGLANG_LOG_EXPERT_LOCATION_METADATA": "1"}
    engine = run(serve, arguments, tiny.prompts, ROUNDS, result, log=tmp_path / "engine.log", env=env)
    assert result.exists(), engine.tail()
    log, rebalances = engine.text(), engine.rebalances()
    assert "eplb-plugin is active" in log
    assert "do not move with the experts" not in log
    assert "could not be checked" not in log

    rounds = json.loads(result.read_text())
    assert rounds == [[tokens[:count] for tokens in tiny.tokens] for count in ROUNDS]
    first = log.index("rebalance 1:")
    assert log.index("round 1 done") < first < log.index("round 2 done")
    assert len(rebalances) >= 10
    assert sum(moves > 0 for moves, _ in rebalances) >= 3

    # Recorded beside all of that: each token once, although both ranks have all of them.
    recording = read_recording(tmp_path / "recorded")
    assert recording.left_out == ()
    assert recording.newest.topology == Topology(num_ranks=2, num_slots=SLOTS)
    assert (recording.newest.engine, recording.newest.steps) == ("SGLang", INTERVAL)
    assert recording.newest.expert_bytes > 0
    assert recording.step_seconds > 0
    tokens = recording.trace.samples.sum(2)
    assert int(tokens[:, -1].mode().values) == TOP_K * len(tiny.prompts)
    assert recording.trace.num_steps >= 10 * INTERVAL

    # What SGLang had in force until the first rebalance is what was planned offline.
    layout = re.findall(r"layer=(\d+): ep0=(\[.*?\]) ep1=(\[.*?\])", log)[:LAYERS]
    in_force = [json.loads(a) + json.loads(b) for _, a, b in layout]
    assert in_force == json.loads(planned.read_text())["physical_to_logical_map"]


def serve(*arguments):
    from tests.engines.sglang import drive

    drive.generate_in_rounds(*arguments)


def plan_offline(folder):
    """A map for `--init-expert-location`, by the command that users run."""
    profile = TrafficProfile(name="tiny", layers=LAYERS, experts=EXPERTS, top_k=TOP_K, log_std=1.0)
    save_load_trace(folder / "load.npz", generate(profile, steps=64, tokens_per_step=64))
    program = str(Path(sys.executable).with_name("eplb-plugin"))
    command = [program, "plan", "load.npz", "--ranks", "2", "--slots", str(SLOTS), "--format", "sglang"]
    subprocess.run([*command, "-o", "map.json"], check=True, timeout=120, cwd=folder)
    return folder / "map.json"
