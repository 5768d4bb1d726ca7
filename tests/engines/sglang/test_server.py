"""The real HTTP server on two ranks, under concurrent requests while it rebalances."""

from __future__ import annotations

import json
import os
import runpy
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
import torch

from eplb_plugin import Placement
from tests.engines.forked import run_forked
from tests.engines.sglang.engine_process import EngineLog, started
from tests.engines.sglang.tiny_model import EXPERTS, LAYERS, NEW_TOKENS
from tests.series import fetch

SLOTS = 24
CLIENTS = 4
BATCH = 2 * CLIENTS
START_LIMIT = 240


def arguments(model, port, *more):
    """The command line of a server for the tiny model on two ranks."""
    return [
        *("-m", "sglang.launch_server", "--model-path", str(model), "--port", str(port)),
        *("--device", "cpu", "--dtype", "float32", "--tp-size", "2", "--ep-size", "2"),
        *("--skip-tokenizer-init", "--skip-server-warmup", "--attention-backend", "torch_native"),
        *("--disable-cuda-graph", "--disable-overlap-schedule", "--disable-radix-cache"),
        *("--max-total-tokens", "2048", "--max-running-requests", "8", "--mem-fraction-static", "0.3"),
        *("--ep-num-redundant-experts", str(SLOTS - EXPERTS), "--eplb-rebalance-num-iterations", "10"),
        *more,
    ]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Client:
    """Asks a server for tokens and compares them with those of transformers."""

    def __init__(self, port, tiny):
        self.url = f"http://127.0.0.1:{port}"
        self.tiny = tiny

    def wait_until_up(self, server):
        deadline = time.monotonic() + START_LIMIT
        while time.monotonic() < deadline and server.process.poll() is None:
            try:
                if requests.get(f"{self.url}/health", timeout=30).status_code == 200:
                    return
            except (requests.ConnectionError, requests.Timeout):
                pass
            time.sleep(0.2)
        raise AssertionError(f"the server did not start\n{server.tail()}")

    def ask(self, number):
        """Whether the answer to one prompt is right; anything but an answer is an error."""
        # Two of the prompts in each batch of `ask_until`: other experts are hot in the next one, so that it
        # pays to move some.
        prompt = (number // BATCH * 2 + number % 2) % len(self.tiny.prompts)
        sampling = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
        body = {"input_ids": self.tiny.prompts[prompt], "sampling_params": sampling}
        response = requests.post(f"{self.url}/generate", json=body, timeout=120)
        response.raise_for_status()
        return response.json()["output_ids"] == self.tiny.tokens[prompt]

    def ask_until(self, server, done, most=400):
        """Ask from several clients until `done(server)`: how many answers were right, and of how many."""
        right = total = 0
        with ThreadPoolExecutor(CLIENTS) as clients:
            while not done(server) and total < most:
                right += sum(clients.map(self.ask, range(total, total + BATCH)))
                total += BATCH
        return right, total


@pytest.mark.timeout(600)
def test_serving_goes_on_through_rebalances_and_a_failing_planner(tiny, tmp_path):
    switch = tmp_path / "fail"
    port = free_port()
    algorithm = "eplb_plugin:move_price=0.005,metrics=true"
    command = arguments(tiny.path, port, "--enable-metrics", "--enable-eplb", "--eplb-algorithm", algorithm)
    env = {"TEST_PLANNER_FAILS_WHEN": str(switch), "SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR": str(tmp_path)}
    with started(command, tmp_path / "server.log", env) as server:
        client = Client(port, tiny)
        client.wait_until_up(server)

        # Requests of several clients while the server rebalances: all are answered, with the right tokens.
        right, total = client.ask_until(server, lambda server: len(server.rebalances()) >= 10)
        assert right == total
        rebalances = server.rebalances()
        assert len(rebalances) >= 10, server.tail()
        assert sum(moves > 0 for moves, _ in rebalances) >= 3
        assert not any("failed" in kept for _, kept in rebalances)

        # From now on the planner raises: the map stays, requests are answered as before.
        switch.touch()
        failed = "failed, RuntimeError: this planner fails on purpose; the map in force stays"
        right, total = client.ask_until(server, lambda server: server.text().count(failed) >= 3)
        assert right == total
        assert server.text().count(f"{failed}; ") >= 3, server.tail()
        # On each of the two ranks the cause is told once, with its traceback; each rebalance counts.
        once = failed.replace("failed, ", "failed: ") + "; this is said once"
        assert server.text().count(once) == 2
        assert "; 3 failures so far" in server.text()

        # And once it no longer does, the server rebalances again.
        switch.unlink()
        seen = len(server.rebalances())
        right, total = client.ask_until(
            server, lambda server: any(moves for moves, _ in server.rebalances()[seen:])
        )
        assert right == total
        assert any(moves for moves, _ in server.rebalances()[seen:])
        check_metrics(fetch(port), server.rebalances())

        # What SGLang's recorder writes is a load to plan from. It starts anew at each rebalance, so one of
        # two dumps may be empty.
        for number in range(2):
            assert client.ask(number)
            requests.post(f"{client.url}/dump_expert_distribution_record", timeout=60).raise_for_status()
    dumps = list(tmp_path.glob("expert_distribution_recorder_*.pt"))
    assert len(dumps) == 2
    check_offline_plan(max(dumps, key=lambda path: int(torch.load(path)["logical_count"].sum())))


def check_metrics(metrics, rebalances):
    """SGLang's own /metrics shows what the plugin has logged of the (moves, why the map stayed)."""
    names = [name for name in metrics if name.startswith("eplb_rebalances_total")]
    (model,) = {name.partition("{")[2].partition(",")[0] for name in names}
    failed = sum("failed" in kept for _, kept in rebalances)
    applied = sum(not kept for _, kept in rebalances)
    assert metrics[f"eplb_rebalances_total{{{model},failed}}"] == failed >= 3
    assert metrics[f"eplb_rebalances_total{{{model},applied}}"] == applied >= 3
    assert metrics[f"eplb_rebalances_total{{{model},skipped}}"] == len(rebalances) - failed - applied
    moves = sum(moves for moves, _ in rebalances)
    assert metrics[f"eplb_experts_moved_total{{{model}}}"] == moves
    expert = metrics[f"eplb_moved_bytes_total{{{model}}}"] / moves
    assert expert == int(expert) > 0
    for name in ("observed_balancedness", "predicted_balancedness"):
        assert 0 < metrics[f"eplb_{name}_ratio{{{model}}}"] <= 1
    assert metrics[f"eplb_lower_bound_gap_ratio{{{model}}}"] >= 0
    assert metrics[f"eplb_rebalance_seconds_total{{{model},plan}}"] > 0
    assert 0 <= metrics[f"eplb_steps_since_rebalance{{{model}}}"] <= 10


def check_offline_plan(dump):
    program = str(Path(sys.executable).with_name("eplb-plugin"))
    options = ["--ranks", "2", "--slots", str(SLOTS), "--format", "sglang", "-o", "map.json"]
    subprocess.run([program, "plan", dump.name, *options], check=True, timeout=120, cwd=dump.parent)
    rows = json.loads(dump.with_name("map.json").read_text())["physical_to_logical_map"]
    placement = Placement(torch.tensor(rows), EXPERTS)
    assert (placement.num_layers, placement.num_slots) == (LAYERS, SLOTS)


def launch(*arguments):
    sys.argv[1:] = arguments
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)


def test_a_bad_option_stops_the_launch(tiny, tmp_path):
    _, _, *line = arguments(
        tiny.path, free_port(), "--enable-eplb", "--eplb-algorithm", "eplb_plugin:moves=3"
    )
    log = tmp_path / "server.log"
    status = run_forked(launch, *line, log=log, env=os.environ, limit=START_LIMIT)
    assert status, f"{status}\n{EngineLog(log).tail()}"
    assert "ConfigError: --eplb-algorithm eplb_plugin:moves=3: unknown option 'moves'" in log.read_text()
