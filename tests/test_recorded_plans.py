"""The default planner makes the plans that it made when `recorded_plans.json` was written, to the bit.

A change that is meant to alter plans records them anew: `python -m tests.test_recorded_plans`.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import eplb_plugin as eplb

ROOT = Path(__file__).resolve().parents[1]
RECORD = Path(__file__).with_name("recorded_plans.json")
sys.path.insert(0, str(ROOT / "benchmarks"))

import bench_plan  # noqa: E402
import bench_policies  # noqa: E402

RANDOM_CASES = 50


def digest(*placements: torch.Tensor) -> str:
    """A hash of placements, int64 [layers, slots] each."""
    content = hashlib.sha256()
    for ids in placements:
        content.update(f"{ids.dtype} {tuple(ids.shape)}".encode())
        content.update(ids.contiguous().numpy().tobytes())
    return content.hexdigest()[:16]


def one_load(size: tuple[int, ...], draw: Callable[[int, int], torch.Tensor]) -> str:
    """Plans of one load, of a size of `bench_plan`."""
    layers, experts, slots, groups, nodes, ranks = size
    topology = eplb.Topology(num_nodes=nodes, num_ranks=ranks, num_slots=slots, num_groups=groups)
    return digest(eplb.plan(draw(layers, experts), topology).placement.physical_to_logical)


def eight_rebalances(size: tuple[int, ...]) -> str:
    """The full plans of `bench_plan`: from the placement that engines load, then each from the one before."""
    layers, experts, slots, groups, nodes, ranks = size
    topology = eplb.Topology(num_nodes=nodes, num_ranks=ranks, num_slots=slots, num_groups=groups)
    steps = bench_plan.window(layers, experts, 8)
    placement = eplb.Placement.default(layers, experts, slots)
    made = []
    for end in range(32, 257, 32):
        placement = eplb.plan(steps[max(0, end - 128) : end], topology, placement).placement
        made.append(placement.physical_to_logical)
    return digest(*made)


def replayed(case: bench_policies.Case) -> str:
    """All plans of a case of `bench_policies`."""
    made = []

    def policy(window: torch.Tensor, topology: eplb.Topology, current: eplb.Placement) -> eplb.Placement:
        placement = eplb.plan(window, topology, current).placement
        made.append(placement.physical_to_logical)
        return placement

    setup = bench_policies.PolicySetup("recorded", policy)
    bench_policies.simulate(case.trace, case.topology, setup, case.interval)
    return digest(*made)


def random_case(seed: int) -> str:
    """A plan from a random placement in force, of random numbers and options."""
    generator = torch.Generator().manual_seed(seed)

    def below(bound: int) -> int:
        return int(torch.randint(bound, (), generator=generator))

    nodes, per_node, groups = (1, 2, 4)[below(3)], 1 + below(4), 1
    if nodes > 1:
        groups = nodes * (1 + below(2))
    ranks = nodes * per_node
    experts = groups * (2 + below(12))
    per_rank = -(-experts // ranks) + below(3)
    slots = ranks * per_rank
    layers, snapshots = 1 + below(4), (1, 3, 16, 40)[below(4)]
    topology = eplb.Topology(num_nodes=nodes, num_ranks=ranks, num_slots=slots, num_groups=groups)
    rows = []
    for _ in range(layers):
        spare = torch.randint(experts, (slots - experts,), generator=generator)
        ids = torch.cat([torch.arange(experts), spare])
        rows.append(ids[torch.randperm(slots, generator=generator)])
    load = torch.empty(snapshots, layers, experts).log_normal_(4, 1, generator=generator).round()
    options = (
        eplb.PlannerOptions(),
        eplb.PlannerOptions(move_price=0),
        eplb.PlannerOptions(max_moves=4),
        eplb.PlannerOptions(move_price=0.05, min_gain=0.0),
    )[below(4)]
    return digest(eplb.plan(load, topology, torch.stack(rows), options).placement.physical_to_logical)


def jobs() -> dict[str, Callable[[], str]]:
    """What is recorded, by name; the cases of real traces only where those are."""
    found: dict[str, Callable[[], str]] = {}
    for size in bench_plan.SIZES:
        name = " ".join(map(str, size))
        found[f"one load {name} lognormal"] = lambda size=size: one_load(size, bench_plan.lognormal)
        found[f"one load {name} zipf"] = lambda size=size: one_load(size, bench_plan.zipf)
        found[f"eight rebalances {name}"] = lambda size=size: eight_rebalances(size)
    for seed in range(RANDOM_CASES):
        found[f"random case {seed}"] = lambda seed=seed: random_case(seed)
    return found


def policy_cases() -> list[bench_policies.Case]:
    from rich.console import Console

    return list(bench_policies.cases(Console(), quick=True))


@pytest.fixture(scope="module")
def recorded() -> dict[str, str]:
    return json.loads(RECORD.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", jobs())
def test_a_plan_is_the_recorded_one(name, recorded):
    assert jobs()[name]() == recorded[name]


def test_the_plans_of_the_traces_are_the_recorded_ones(recorded):
    found = {f"replay of {case.name}": replayed(case) for case in policy_cases()}
    assert found == {name: recorded[name] for name in found}
    real = {name for name in recorded if name.startswith("replay of")} - set(found)
    if real:
        pytest.skip(f"the traces of {sorted(real)} are not there")


if __name__ == "__main__":
    made = {name: job() for name, job in jobs().items()}
    made |= {f"replay of {case.name}": replayed(case) for case in policy_cases()}
    RECORD.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
