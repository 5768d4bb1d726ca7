"""Running kernels on threads: the number of threads and the calling thread change nothing."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch

import eplb_plugin as eplb
from eplb_plugin.planning import layer_threads

TOPOLOGY = eplb.Topology(num_ranks=8, num_slots=72)


def planned(load: torch.Tensor) -> torch.Tensor:
    first = eplb.plan(load.sum(0), TOPOLOGY).placement
    return eplb.plan(load, TOPOLOGY, first).placement.physical_to_logical


@pytest.mark.parametrize("cores", [1, 2, 5])
def test_any_number_of_threads_gives_the_same_plan(monkeypatch, cores):
    load = torch.empty(8, 12, 64).log_normal_(3, 1, generator=torch.Generator().manual_seed(0))
    expected = planned(load)
    monkeypatch.setattr(layer_threads, "_usable_cores", lambda: cores)
    assert torch.equal(planned(load), expected)
    found = []
    thread = threading.Thread(target=lambda: found.append(planned(load)))
    thread.start()
    thread.join()
    assert torch.equal(found[0], expected)


def test_a_failure_in_any_chunk_is_raised(monkeypatch):
    monkeypatch.setattr(layer_threads, "_usable_cores", lambda: 2)

    def work(first: int, last: int) -> None:
        raise RuntimeError(f"layers {first}..{last - 1}")

    with pytest.raises(RuntimeError, match="layers"):
        layer_threads.over_layers(work, torch.ones(2, 64, 64))


def test_warmup_of_any_topology():
    eplb.warmup()
    eplb.warmup(eplb.Topology(num_nodes=2, num_ranks=6, num_slots=12, num_groups=4))
    eplb.warmup(eplb.Topology(num_ranks=1, num_slots=1))


@pytest.mark.timeout(600)  # where nothing is compiled yet
def test_after_warmup_a_plan_imports_nothing():
    """An import takes long in the background of a busy engine."""
    code = (
        "import sys, torch, eplb_plugin as eplb\n"
        "eplb.warmup()\n"
        "before = set(sys.modules)\n"
        "load = torch.rand(3, 2, 16, generator=torch.Generator().manual_seed(0))\n"
        "for nodes, price in ((1, 0.0), (1, 0.009), (2, 0.0), (2, 0.009)):\n"
        "    topology = eplb.Topology(num_nodes=nodes, num_ranks=4, num_slots=20, num_groups=4)\n"
        "    options = eplb.PlannerOptions(move_price=price)\n"
        "    eplb.plan(load, topology, eplb.Placement.default(2, 16, 20), options)\n"
        "    eplb.plan(load, topology)\n"
        "print(sorted(set(sys.modules) - before))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=500
    )
    assert result.stdout == "[]\n"
