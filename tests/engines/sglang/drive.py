"""Runs SGLang's engine. Imported in the process that all engines but the servers are forked from."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# What an engine's processes would import one by one.
import sglang.srt.managers.detokenizer_manager
import sglang.srt.managers.scheduler
import sglang.srt.models.qwen3_moe  # noqa: F401
from sglang import Engine

import eplb_plugin

eplb_plugin.warmup()


def start(arguments: dict[str, Any]) -> Engine:
    """An engine that forks its processes; SGLang itself starts interpreters that import all of it again."""
    multiprocessing.set_start_method("fork", force=True)
    multiprocessing.set_start_method = lambda method, force=False: None
    return Engine(**arguments)


def generate_in_rounds(
    arguments: dict[str, Any], prompts: list[list[int]], rounds: Sequence[int], result: Path
) -> None:
    """Write the tokens of each prompt for each round; a round's number is how many."""
    engine = start(arguments)
    tokens = []
    for new_tokens in rounds:
        sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
        answers = engine.generate(input_ids=prompts, sampling_params=sampling)
        tokens.append([answer["output_ids"] for answer in answers])
        print(f"round {len(tokens)} done", flush=True)
    result.write_text(json.dumps(tokens), encoding="utf-8")
    engine.shutdown()


def _wait_for_dumps(folder: Path, limit: float = 120.0) -> None:
    """Wait until every rank has written its file: the engine only waits for the first one."""
    before: dict[str, int] = {}
    end = time.monotonic() + limit
    while time.monotonic() < end:
        files = {path.name: path.stat().st_size for path in folder.iterdir()}
        if files and files == before and all(zipfile.is_zipfile(folder / name) for name in files):
            return
        before = files
        time.sleep(1.0)


def dump_recorded(arguments: dict[str, Any], prompts: list[list[int]], new_tokens: int) -> None:
    """Dump what the recorder saw, to the folder SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR."""
    engine = start(arguments)
    engine.start_expert_distribution_record()
    sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
    engine.generate(input_ids=prompts, sampling_params=sampling)
    engine.stop_expert_distribution_record()
    engine.dump_expert_distribution_record()
    _wait_for_dumps(Path(os.environ["SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR"]))
    print("dumped", flush=True)
    engine.shutdown()
