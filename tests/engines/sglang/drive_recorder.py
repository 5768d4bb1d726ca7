"""Run SGLang's engine with its recorder on, and dump what it recorded.

ARGUMENTS: {"engine": {...}, "prompts": [[...]], "new_tokens": of each prompt}. The folder for the dumps is
named by SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    import sglang

    arguments = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    engine = sglang.Engine(**arguments["engine"])
    engine.start_expert_distribution_record()
    sampling = {"temperature": 0, "max_new_tokens": arguments["new_tokens"], "ignore_eos": True}
    engine.generate(input_ids=arguments["prompts"], sampling_params=sampling)
    engine.stop_expert_distribution_record()
    engine.dump_expert_distribution_record()
    print("dumped", flush=True)
    engine.shutdown()


# SGLang starts its processes by importing this module again.
if __name__ == "__main__":
    main()
