"""Runs one engine through a scenario: `python -m tests.engines.vllm.drive SCENARIO.json RESULT.json`."""

import json
import sys
from pathlib import Path

NEW_TOKENS = 24
PROMPTS = [[(37 * n + 11 * k * k) % 500 + 2 for k in range(12)] for n in range(8)]


def traffic(number):
    """Other prompts, made of few tokens, so that the load of the experts changes from round to round."""
    return [[(17 * number + 5 * n + k % 3) % 500 + 2 for k in range(16)] for n in range(8)]


def main(scenario, result_path):
    from vllm import LLM, SamplingParams

    llm = LLM(**scenario["llm"])
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)

    def generate(prompts):
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = llm.generate(requests, sampling, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    result = {"steps": {}}
    for step in scenario["steps"]:
        name = step["name"]
        for method, *args in step.get("before", []):
            result[method] = llm.collective_rpc(method, args=tuple(args))
        rounds = []
        for number in range(step["rounds"]):
            rounds.append(generate(PROMPTS))
            if step.get("traffic"):
                generate(traffic(number))
        after = {}
        if scenario.get("watched"):
            folder = Path(scenario["watched"])
            after["checks"] = [json.loads(path.read_text()) for path in sorted(folder.glob("checks-*.json"))]
        if step.get("report"):
            after["report"] = llm.collective_rpc("eplb_plugin_report")
        result["steps"][name] = {"rounds": rounds, **after}
    result_path.write_text(json.dumps(result))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
