"""Run SGLang's engine with the arguments of a JSON file and write what it generates.

ARGUMENTS: {"engine": {...}, "prompts": [[...]], "rounds": [new tokens of each round], "result": path}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    import sglang

    arguments = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    engine = sglang.Engine(**arguments["engine"])
    rounds = []
    for new_tokens in arguments["rounds"]:
        sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
        answers = engine.generate(input_ids=arguments["prompts"], sampling_params=sampling)
        rounds.append([answer["output_ids"] for answer in answers])
        print(f"round {len(rounds)} done", flush=True)
    Path(arguments["result"]).write_text(json.dumps(rounds), encoding="utf-8")
    engine.shutdown()


# SGLang starts its processes by importing this module again.
if __name__ == "__main__":
    main()
