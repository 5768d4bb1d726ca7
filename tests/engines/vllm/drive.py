"""Runs one engine through a scenario. Imported in the process that engines are forked from."""

import json
import multiprocessing
import time
from pathlib import Path

# What an engine's processes would import one by one. Without the planner's numba: vLLM's workers look through
# all modules when they start, and fail on llvmlite's.
import vllm.distributed.eplb.async_worker
import vllm.model_executor.models.deepseek_v2
import vllm.model_executor.models.ernie45_moe
import vllm.model_executor.models.glm4_moe
import vllm.model_executor.models.lfm2_moe
import vllm.model_executor.models.mixtral
import vllm.model_executor.models.qwen3_moe
import vllm.model_executor.models.registry
import vllm.v1.engine.coordinator
import vllm.v1.engine.core
import vllm.v1.engine.utils
import vllm.v1.executor.multiproc_executor
import vllm.v1.worker.cpu_worker
from vllm import LLM, SamplingParams

from . import weight_faults, worker_checks  # noqa: F401
from .prompts import NEW_TOKENS, PROMPTS, traffic
from .step_loads import count_steps

MOST_ROUNDS = 40  # of a step that waits for failures

# vLLM forks its processes on GPUs; on CPUs it starts interpreters, and each imports all of it again, for many
# seconds. `test_server.py` has those, too.
for module in (vllm.v1.engine.coordinator, vllm.v1.engine.utils, vllm.v1.executor.multiproc_executor):
    module.get_mp_context = lambda: multiprocessing.get_context("fork")


# It starts an interpreter to look at a model's class, so that CUDA is not initialised.
vllm.model_executor.models.registry._run_in_subprocess = lambda look: look()


class Meeting:
    """Where the processes of data-parallel ranks wait for each other: none has requests, or ends, alone."""

    def __init__(self, result_path, peers):
        self._path, self._peers, self._number = result_path, peers, 0

    def __call__(self):
        self._number += 1
        self._path.with_suffix(f".{self._number}").touch()
        while len(list(self._path.parent.glob(f"result*.{self._number}"))) < self._peers:
            time.sleep(0.01)


def count_failures(llm):
    """The failures of each rank's planners so far."""
    ranks = llm.collective_rpc("eplb_plugin_report")
    return [sum(model["failures"] for model in rank["models"].values()) for rank in ranks]


def main(scenario, result_path):
    if "put_in" in scenario:
        weight_faults.put_in(scenario["put_in"])
    llm = LLM(**scenario["llm"])
    length = scenario.get("new_tokens", NEW_TOKENS)
    sampling = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, detokenize=False)
    meet = Meeting(result_path, scenario.get("peers", 1))

    def generate(prompts):
        meet()
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = llm.generate(requests, sampling, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    result = {"steps": {}}
    for step in scenario["steps"]:
        name = step["name"]
        for method, *args in step.get("before", []):
            result[method] = llm.collective_rpc(method, args=tuple(args))
        rounds = []
        failures = count_failures(llm) if step.get("until_failures") else []
        for number in range(step["rounds"]):
            rounds.append(generate(PROMPTS))
            if step.get("traffic"):
                generate(traffic(number))
        if step.get("until_failures"):
            # The planner may outlast the rounds, and fail first as the step before made it.
            for number in range(step["rounds"], MOST_ROUNDS):
                if all(now > then + 1 for then, now in zip(failures, count_failures(llm), strict=True)):
                    break
                generate(traffic(number))
        after = {}
        if scenario.get("watched"):
            folder = Path(scenario["watched"])
            after["checks"] = [json.loads(path.read_text()) for path in sorted(folder.glob("checks-*.json"))]
            after["counted"] = count_steps(folder)
        if step.get("report"):
            after["report"] = llm.collective_rpc("eplb_plugin_report")
        result["steps"][name] = {"rounds": rounds, **after}
    result_path.write_text(json.dumps(result))
    meet()
    # Its processes do not end by themselves in the time that vLLM gives them.
    llm.llm_engine.engine_core.shutdown(timeout=1)
