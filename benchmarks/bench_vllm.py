"""Our planner beside vLLM's default policy, in the real vLLM on CPU ranks: `make bench-vllm`.

A tiny model whose routers favour a few experts serves the same steady traffic twice. Balancedness is what
vLLM itself logs, moved rows are counted in the workers, and the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
INTERVAL = 32
LOGGED = re.compile(r"EPLB step: \d+ for .* avg_tokens=([\d.]+), max_tokens=(\d+)")


def serve(scenario: dict[str, object]) -> None:
    """One engine through its traffic, in a process of its own; writes moved rows and tokens per second."""
    from vllm import LLM, SamplingParams

    llm = LLM(**scenario["llm"])
    sampling = SamplingParams(temperature=0, max_tokens=scenario["tokens"], ignore_eos=True, detokenize=False)
    llm.collective_rpc("watch")
    before = _checks(scenario)
    rounds = []
    for prompts in _traffic(scenario["rounds"], scenario["batch"]):
        print(f"round {len(rounds)}", flush=True)
        start = time.perf_counter()
        llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
        seconds = time.perf_counter() - start
        after = _checks(scenario)
        done = {"rows": after["rows"] - before["rows"], "changes": after["changes"] - before["changes"]}
        rounds.append({"tokens_per_second": scenario["batch"] * scenario["tokens"] / seconds, **done})
        before = after
    wrong = len(before["wrong"])
    Path(scenario["result"]).write_text(json.dumps({"rounds": rounds, "wrong": wrong}))


def _traffic(rounds: int, batch: int) -> Iterator[list[list[int]]]:
    """Prompts drawn from one distribution, the same for both policies."""
    import torch

    generator = torch.Generator().manual_seed(1)
    for _ in range(rounds):
        yield torch.randint(2, 512, (batch, 16), generator=generator).tolist()


def _checks(scenario: dict[str, object]) -> dict[str, object]:
    return json.loads((Path(scenario["folder"]) / "checks-0.json").read_text())


def run(policy: str, model: Path, folder: Path, options: argparse.Namespace) -> dict[str, object]:
    """What one policy made of the traffic."""
    sys.path.insert(0, str(ROOT))
    from tests.engines.vllm.conftest import eplb_arguments, llm_arguments
    from tests.engines.vllm.processes import engine, environment, tail

    arguments = llm_arguments(model, options.ranks, **eplb_arguments(use_async=False))
    arguments["eplb_config"] |= {
        "window_size": INTERVAL,
        "step_interval": INTERVAL,
        "log_balancedness": True,
        "log_balancedness_interval": 1,
    }
    if policy == "eplb_plugin":
        arguments["additional_config"] = {"eplb_plugin": {"enabled": True}}
    scenario = {
        "llm": arguments,
        "rounds": options.rounds,
        "batch": 32,
        "tokens": INTERVAL,
        "folder": str(folder),
        "result": str(folder / "result.json"),
    }
    (folder / "scenario.json").write_text(json.dumps(scenario))
    log = folder / "engine.log"
    command = [str(Path(__file__).resolve()), "--serve", str(folder / "scenario.json")]
    with engine(command, log, environment(options.ranks, folder)) as process:
        try:
            code = process.wait(options.limit)
        except subprocess.TimeoutExpired:
            code = "still running"
    if code != 0:
        raise SystemExit(f"{policy}: {code}\n{tail(log)}")
    result = json.loads((folder / "result.json").read_text())
    return summarise(policy, result, log.read_text(errors="replace"))


def summarise(policy: str, result: dict[str, object], log: str) -> dict[str, object]:
    """Balancedness before the first rearrangement, after the first three, and in the second half; rows moved
    per rearrangement in each half."""
    parts = re.split(r"Rearranged experts\s+in", log)
    logged = []
    for found in (LOGGED.findall(part) for part in parts):
        peak = sum(int(peak) for _, peak in found)
        logged.append(sum(float(mean) for mean, _ in found) / peak if peak else 1.0)
    rounds = result["rounds"]
    half = len(rounds) // 2
    return {
        "policy": policy,
        "before": round(logged[0], 3),
        "after first 3": round(statistics.mean(logged[1:4]), 3),
        "steady": round(statistics.mean(logged[len(logged) // 2 : -1]), 3),
        "rows, first half": round(statistics.mean(one["rows"] for one in rounds[:half]), 1),
        "rows, steady": round(statistics.mean(one["rows"] for one in rounds[half:]), 1),
        "tokens/s": round(statistics.median(one["tokens_per_second"] for one in rounds[half:])),
        "wrong rows": result["wrong"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=24, help="batches of 32 requests, one interval each")
    parser.add_argument("--limit", type=float, default=600, help="seconds of one engine")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(json.loads(options.serve.read_text()))
        return
    from vllm_eplb_on_cpu.model import save_tiny_model

    results = []
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        save_tiny_model(model, favoured=range(4))
        for policy in ("default", "eplb_plugin"):
            place = Path(folder) / policy
            place.mkdir()
            results.append(run(policy, model, place, options))
    title = (
        f"vLLM on {options.ranks} CPU ranks, 4 layers, 16 experts in 20 slots; balancedness as vLLM logs it"
    )
    table = Table(title=title)
    for name in results[0]:
        table.add_column(name, justify="left" if name == "policy" else "right")
    for result in results:
        table.add_row(*(str(value) for value in result.values()))
    Console(width=110).print(table)
    default, ours = (result["rows, steady"] for result in results)
    share = round(ours / default, 4) if default else None
    print(json.dumps({"ranks": options.ranks, "results": results, "steady_rows_share": share}))


if __name__ == "__main__":
    main()
