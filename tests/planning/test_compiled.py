"""Running kernels on threads: the number of threads and the calling thread change nothing."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch

import eplb_plugin as eplb
from eplb_plugin.planning.kernels import (
    api,
    forecast,
    group_to_node,
    lower_bounds,
    placement_tables,
    plan_layers,
)

TOPOLOGY = eplb.Topology(num_ranks=8, num_slots=72)


def planned(load: torch.Tensor) -> torch.Tensor:
    first = eplb.plan(load.sum(0), TOPOLOGY).placement
    return eplb.plan(load, TOPOLOGY, first).placement.physical_to_logical


@pytest.mark.parametrize("cores", [1, 2, 5])
def test_any_number_of_threads_gives_the_same_plan(monkeypatch, cores):
    load = torch.empty(8, 12, 64).log_normal_(3, 1, generator=torch.Generator().manual_seed(0))
    expected = planned(load)
    monkeypatch.setattr(api, "_usable_cores", lambda: cores)
    assert torch.equal(planned(load), expected)
    found = []
    thread = threading.Thread(target=lambda: found.append(planned(load)))
    thread.start()
    thread.join()
    assert torch.equal(found[0], expected)


def test_a_failure_in_any_chunk_is_raised(monkeypatch):
    monkeypatch.setattr(api, "_usable_cores", lambda: 2)

    def work(first: int, last: int) -> None:
        raise RuntimeError(f"layers {first}..{last - 1}")

    with pytest.raises(RuntimeError, match="layers"):
        api.over_layers(work, torch.ones(2, 64, 64))


def compiled_versions() -> dict[str, int]:
    """How often each function that Python calls was compiled or loaded."""
    entry_points = {
        **{name: getattr(placement_tables, name) for name in placement_tables.__all__},
        "plan_layers": plan_layers.plan_layers,
        "choose_nodes": group_to_node.choose_nodes,
        "bound_rows": lower_bounds.bound_rows,
        "expect_loads": forecast.expect_loads,
    }
    return {name: len(function.signatures) for name, function in entry_points.items()}


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "topology",
    [
        eplb.Topology(num_ranks=1, num_slots=12),
        eplb.Topology(num_nodes=2, num_ranks=6, num_slots=12, num_groups=4),
        eplb.Topology(num_ranks=3, num_slots=14, rank_slots=(5, 5, 4)),
    ],
)
def test_after_warmup_nothing_is_compiled(topology, dtype):
    eplb.warmup(topology)
    before = compiled_versions()
    load = torch.randint(1, 100, (4, 3, 12)).to(dtype)
    start = eplb.plan(load[0], topology).placement
    for window in (load[:1], load, load.permute(0, 2, 1).contiguous().permute(0, 2, 1)):
        planned = eplb.plan(window, topology, start)
        assert (planned.lower_bound > 0).all()
    assert compiled_versions() == before


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
