"""The OpenAI-compatible server under concurrent requests, while experts move under them."""

import asyncio
import contextlib
import json
import time
import urllib.request

import pytest

from tests.series import fetch

from .conftest import BALANCED, LIMIT, RESTLESS, eplb_arguments, llm_arguments
from .processes import engine, environment, free_port, tail
from .prompts import NEW_TOKENS, PROMPTS
from .step_loads import read_steps, wrong_steps

pytestmark = pytest.mark.timeout(2 * LIMIT)

REQUESTS = 256
CONCURRENCY = 32
STEP_INTERVAL = 16  # a slow server takes more steps; no more than 64 reports are kept
# One as users start it; the other spares the imports of six processes, and splits batches over all ranks.
LAYOUTS = {
    "tensor": ("vllm.entrypoints.openai.api_server", ["--tensor-parallel-size", "2"], RESTLESS),
    "data": (
        "tests.engines.vllm.serve",
        ["--data-parallel-size", "2", "--all2all-backend", "allgather_reducescatter"],
        BALANCED,
    ),
}


def command_line(module, model, port, options):
    """The server with the arguments that the offline engine gets, EPLB asynchronous."""
    arguments = llm_arguments(model) | eplb_arguments(use_async=True)
    arguments["eplb_config"]["step_interval"] = STEP_INTERVAL
    for name in ("model", "skip_tokenizer_init", "tensor_parallel_size", "enable_prefix_caching"):
        del arguments[name]
    line = ["-m", module, "--model", str(model), "--served-model-name", "tiny"]
    line += ["--host", "127.0.0.1", "--port", str(port), "--no-enable-prefix-caching"]
    line += ["--additional-config", json.dumps({"eplb_plugin": options | {"metrics": True}})]
    for name, value in arguments.items():
        flag = f"--{name.replace('_', '-')}"
        line += (
            [flag] if value is True else [flag, json.dumps(value) if isinstance(value, dict) else str(value)]
        )
    return line


def wait_until_healthy(port, process, log):
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        assert process.poll() is None, tail(log)
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            return
        time.sleep(0.5)
    pytest.fail(f"not healthy after {LIMIT} s\n{tail(log)}")


def call_workers(port, method):
    """Ask for a method of the workers, on all engines; the first engine's results."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/collective_rpc",
        json.dumps({"method": method}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)["results"]


def report_and_metrics(port):
    """The workers' reports and the server's metrics of the same moment: an idle engine of a data-parallel
    group takes steps, and so may rearrange, until the others have nothing to do either."""
    report = call_workers(port, "eplb_plugin_report")
    for _ in range(20):
        metrics = fetch(port)
        before, report = report, call_workers(port, "eplb_plugin_report")
        if report == before:
            return report, metrics
        time.sleep(1)
    pytest.fail("the server rearranged for 20 seconds after its last request")


async def complete_all(port):
    """The tokens that the server makes of each request's prompt, CONCURRENCY requests at a time."""
    from openai import AsyncOpenAI

    room = asyncio.Semaphore(CONCURRENCY)
    async with AsyncOpenAI(
        base_url=f"http://127.0.0.1:{port}/v1",
        api_key="none",
        max_retries=0,
        # Also for connecting, which the client gives 5 s: on two cores the server may be busy for longer.
        timeout=240,
        # The server ends connections that were idle for a while; a request sent just then would fail.
        default_headers={"Connection": "close"},
    ) as client:

        async def complete(prompt):
            async with room:
                answer = await client.completions.create(
                    model="tiny",
                    prompt=prompt,
                    max_tokens=NEW_TOKENS,
                    temperature=0,
                    extra_body={"ignore_eos": True, "return_token_ids": True},
                )
            return answer.choices[0].model_extra["token_ids"]

        return await asyncio.gather(*(complete(PROMPTS[n % len(PROMPTS)]) for n in range(REQUESTS)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_answers_are_right_during_rearrangements(layout, model, expected, tmp_path):
    port, log = free_port(), tmp_path / "server.log"
    series = tmp_path / "series"
    series.mkdir()
    # The first is for the calls of worker methods.
    env = environment(2, tmp_path, VLLM_SERVER_DEV_MODE="1", PROMETHEUS_MULTIPROC_DIR=str(series))
    module, parallel, options = LAYOUTS[layout]
    with engine([*command_line(module, model, port, options), *parallel], log, env) as process:
        wait_until_healthy(port, process, log)
        call_workers(port, "watch")
        try:
            answers = asyncio.run(complete_all(port))
        except Exception as error:
            pytest.fail(f"{error!r}; the server's end: {process.poll()}\n{tail(log)}")
        report, metrics = report_and_metrics(port)
        checks = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("checks-*.json"))]
    assert len(answers) == REQUESTS
    wrong = [n for n, tokens in enumerate(answers) if tokens != expected[n % len(expected)]]
    assert wrong == [], tail(log)
    assert len(checks) == 2
    for rank in checks:
        assert rank["wrong"] == []
        assert rank["changes"] >= 15, checks
    for rank in report:
        (planned,) = rank["models"].values()
        assert planned["failures"] == 0
        assert sum(not one["skipped"] for one in planned["reports"]) >= 5
    check_metrics(metrics, next(iter(report[0]["models"].items())))
    loads, maps = read_steps(tmp_path)
    assert len(loads) >= 50
    wrong = wrong_steps(loads, maps, sharded=layout == "data")
    # vLLM's own mapping knows nothing of the batch.
    assert wrong == [] if layout == "data" else len(wrong) > len(loads) / 2


def check_metrics(metrics, model_reports):
    """Acceptance: the server's /metrics shows what the first rank reports."""
    model, planned = model_reports
    reports = planned["reports"]
    assert len(reports) < 64, "all reports are kept"
    applied = sum(not one["skipped"] for one in reports)
    moves = sum(one["moves"] for one in reports)
    assert metrics[f"eplb_rebalances_total{{{model},applied}}"] == applied
    assert metrics[f"eplb_rebalances_total{{{model},skipped}}"] == len(reports) - applied
    assert metrics[f"eplb_rebalances_total{{{model},failed}}"] == 0
    assert metrics[f"eplb_experts_moved_total{{{model}}}"] == moves
    expert = metrics[f"eplb_moved_bytes_total{{{model}}}"] / moves
    assert expert == int(expert) > 0
    # Intervals without load say nothing about balance.
    last = next(one for one in reversed(reports) if one["window_balancedness_after"] is not None)
    assert metrics[f"eplb_observed_balancedness_ratio{{{model}}}"] == last["balancedness_before"]
    assert metrics[f"eplb_predicted_balancedness_ratio{{{model}}}"] == last["window_balancedness_after"]
    assert metrics[f"eplb_lower_bound_gap_ratio{{{model}}}"] > 0
    # The asynchronous mode lets the engine wait for the last one.
    assert 0 <= metrics[f"eplb_steps_since_rebalance{{{model}}}"] <= 8 * STEP_INTERVAL
