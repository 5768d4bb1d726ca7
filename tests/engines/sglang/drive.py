"""Runs SGLang's engine. Imported in the process that all engines but the servers are forked from."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# What an engine's processes would import one by one.
import sglang.srt.managers.detokenizer_manager
import sglang.srt.managers.scheduler
import sglang.srt.models.qwen3_moe  # noqa: F401
import torch.distributed as dist
from sglang import Engine
from sglang.srt.eplb.expert_distribution import _StatAccumulator

import eplb_plugin
from eplb_plugin.dispatch.batch_split import BatchSplit

eplb_plugin.warmup(dispatch="balanced")


def start(arguments: dict[str, Any]) -> Engine:
    """An engine that forks its processes; SGLang itself starts interpreters that import all of it again."""
    multiprocessing.set_start_method("fork", force=True)
    multiprocessing.set_start_method = lambda method, force=False: None
    return Engine(**arguments)


def generate_in_rounds(
    arguments: dict[str, Any],
    prompts: list[list[int]],
    rounds: Sequence[int],
    result: Path,
    before_last: Callable[[], None] = lambda: None,
) -> None:
    """Write the tokens of each prompt for each round; a round's number is how many."""
    engine = start(arguments)
    tokens: list[Any] = []
    for new_tokens in rounds:
        if len(tokens) == len(rounds) - 1:
            before_last()
        sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
        answers = engine.generate(input_ids=prompts, sampling_params=sampling)
        tokens.append([answer["output_ids"] for answer in answers])
        print(f"round {len(tokens)} done", flush=True)
    result.write_text(json.dumps(tokens), encoding="utf-8")
    engine.shutdown()


def generate_counting_slots(
    arguments: dict[str, Any], prompts: list[list[int]], rounds: Sequence[int], result: Path, folder: Path
) -> None:
    """`generate_in_rounds`, with a line in `folder/RANK` for each forward pass: the tokens of each slot that
    SGLang's recorder has counted, and the map. In the last round rank 1 takes tokens in another order."""
    append, slots, differ = _StatAccumulator.append, BatchSplit.slots, folder / "differ"

    def append_and_tell(self: Any, *args: Any) -> None:
        append(self, *args)
        counted = args[2]["global_physical_count"].tolist()
        placed = self._expert_location_metadata.physical_to_logical_map_cpu.tolist()
        with (folder / str(dist.get_rank())).open("a", encoding="utf-8") as lines:
            lines.write(json.dumps([counted, placed, differ.exists()]) + "\n")

    def slots_or_others(self: BatchSplit, expert_ids: Any, *args: Any) -> Any:
        if differ.exists() and dist.get_rank() == 1:
            return slots(self, expert_ids.flip(0), *args).flip(0)
        return slots(self, expert_ids, *args)

    _StatAccumulator.append, BatchSplit.slots = append_and_tell, slots_or_others
    generate_in_rounds(arguments, prompts, rounds, result, before_last=differ.touch)


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
