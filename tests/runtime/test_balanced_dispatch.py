"""Dispatch `balanced` in the loop: loads of ranks are those of `balance_batch`, and ranks agree."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import eplb_plugin as eplb
from eplb_plugin.dispatch.rank_costs import even_batch, rank_costs, split_balancedness
from tests.processes import run_ranks
from tests.runtime.cases import random_placement

LAYERS, LOGICAL, SLOTS, STEPS = 2, 12, 16, 12


def batch(step: int, layer: int, rank: int) -> torch.Tensor:
    """Skewed expert ids [tokens, 2]; ranks differ in tokens, and rank 1 has none in every third step."""
    generator = torch.Generator().manual_seed(100 * step + 10 * layer + rank)
    tokens = 0 if rank == 1 and step % 3 == 0 else 20 + 5 * rank
    return (torch.rand(tokens, 2, generator=generator) ** 2 * LOGICAL).long()


def counts_of(ids: torch.Tensor, size: int) -> torch.Tensor:
    return torch.bincount(ids[ids >= 0], minlength=size)


def serve(rank: int, size: int, batch_of: str, cost: int) -> list[tuple[list[int], list[float]]]:
    """The tokens of each slot over all steps, and what the reports say."""
    topology = eplb.Topology(num_ranks=size, num_slots=SLOTS)
    options = eplb.RebalancerOptions(
        mode="sync", interval=4, history=1, dispatch="balanced", batch=batch_of, expert_cost=cost
    )
    # Plans for the even split move experts, which those for this dispatch need not.
    planner = eplb.PlannerOptions(dispatch="even")
    balancer = eplb.Rebalancer(topology, LAYERS, LOGICAL, options=options, planner=planner)
    told: list[tuple[list[int], list[float]]] = []
    source = 0 if batch_of == "replicated" else rank
    for step in range(STEPS):
        for layer in range(LAYERS):
            row = balancer.placement.physical_to_logical[layer]
            ids = batch(step, layer, source)
            balancer.record(layer, ids)
            slots = balancer.physical(layer, ids)
            assert torch.equal(row[slots], ids)
            told.append((row.tolist(), counts_of(slots.flatten(), SLOTS).tolist()))
        report = balancer.step(is_dummy=not batch(step, 0, source).numel())
        if report is not None:
            told.append(([], [report.sampled_balancedness_even, report.sampled_balancedness]))
    return told


@pytest.mark.parametrize(
    ("size", "batch_of", "cost"), [(4, "sharded", 0), (2, "sharded", 8), (2, "replicated", 0)]
)
def test_slots_get_the_tokens_that_balance_batch_says(size: int, batch_of: str, cost: int) -> None:
    topology = eplb.Topology(num_ranks=size, num_slots=SLOTS)
    by_rank = run_ranks(serve, size, size, batch_of, cost)
    told = iter(zip(*by_rank, strict=True))
    placements, reports = set(), 0
    samples: list[torch.Tensor] = []
    for step in range(STEPS):
        counts = []
        for layer in range(LAYERS):
            parts = next(told)
            row = parts[0][0]
            assert all(part[0] == row for part in parts)
            slots = torch.tensor([part[1] for part in parts])
            got = slots[0] if batch_of == "replicated" else slots.sum(0)
            sources = range(1 if batch_of == "replicated" else size)
            ids = torch.cat([batch(step, layer, rank) for rank in sources])
            counts.append(counts_of(ids.flatten(), LOGICAL))
            placement = eplb.Placement(torch.tensor([row]), LOGICAL)
            wanted = eplb.balance_batch(counts[-1][None], placement, topology, expert_cost=cost)
            assert torch.equal(got, wanted[0])
            if batch_of == "replicated":
                assert all(torch.equal(part, got) for part in slots)
            placements.add((layer, tuple(row)))
            samples.append(counts[-1])
        if step % 4 == 3:
            parts = next(told)
            before = eplb.Placement(torch.tensor(rows_before(by_rank[0], step)), LOGICAL)
            gain = split_balancedness(torch.stack(samples).view(4, LAYERS, LOGICAL), before, topology, cost)
            assert all(part[1] == pytest.approx(list(gain)) for part in parts)
            assert gain.balanced >= gain.even
            samples, reports = [], reports + 1
    assert reports == 3
    assert len(placements) > LAYERS


def rows_before(told: list[tuple[list[int], list[float]]], step: int) -> list[list[int]]:
    """The placement that a step was served with."""
    steps = [row for row, _ in told if row]
    return steps[LAYERS * step : LAYERS * (step + 1)]


def test_rank_costs_and_the_even_split_are_sums_over_slots() -> None:
    topology = eplb.Topology(num_ranks=3, num_slots=7, rank_slots=(3, 1, 3))
    placement = eplb.Placement(torch.tensor([[0, 1, 0, 2, -1, 0, 2], [2, 1, 0, 0, 1, 2, 2]]), 3)
    counts = torch.tensor([[[11, 3, 5], [4, 1, 7]]])
    tokens = even_batch(counts, placement)
    assert tokens.tolist() == [[[4, 3, 4, 3, 0, 3, 2], [3, 1, 2, 2, 0, 2, 2]]]
    assert rank_costs(tokens, topology).tolist() == [[[11, 3, 5], [6, 2, 4]]]
    assert rank_costs(tokens, topology, 3).tolist() == [[[11, 3, 6], [9, 3, 6]]]
    even = (19 / 3 + 12 / 3) / (11 + 6)
    assert split_balancedness(counts, placement, topology).even == pytest.approx(even)


PROGRAM = """
import hashlib, sys, torch, eplb_plugin as eplb
from tests.runtime.cases import random_placement
order = range(20) if sys.argv[1] == "up" else reversed(range(20))
torch.set_num_threads(int(sys.argv[2]))
found = {}
for seed in order:
    topology = eplb.Topology(num_ranks=4, num_slots=24)
    counts = torch.randint(0, 90, (3, 2, 9), generator=torch.Generator().manual_seed(seed))
    placement = random_placement(2, 9, 24, seed)
    found[seed] = eplb.balance_batch(counts, placement, topology, expert_cost=seed % 3 * 8).tolist()
print(hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest())
"""


def test_processes_with_other_hash_seeds_threads_and_orders_agree() -> None:
    root = Path(__file__).resolve().parents[2]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, order, threads],
            env={**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": threads, "PYTHONPATH": str(root)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for order, threads, seed in (("up", "1", "1"), ("down", "2", "77"))
    ]
    first, second = (process.communicate(timeout=120)[0] for process in running)
    assert all(process.returncode == 0 for process in running)
    assert first == second
    assert len(first.strip()) == 2 * hashlib.sha256().digest_size


def test_options_of_the_dispatch_are_checked() -> None:
    for values, told in (
        ({"expert_cost": -1}, "expert_cost"),
        ({"expert_cost": float("nan")}, "expert_cost"),
        ({"expert_cost": "much"}, "expert_cost"),
        ({"batch": "whole"}, "batch"),
        ({"samples": -1}, "samples"),
    ):
        with pytest.raises(eplb.ConfigError, match=told):
            eplb.RebalancerOptions(dispatch="balanced", **values)  # type: ignore[arg-type]
    options = eplb.RebalancerOptions(dispatch="nearest")
    with pytest.raises(eplb.ConfigError, match="there are even, local_first, balanced"):
        eplb.Rebalancer(eplb.Topology(num_ranks=1, num_slots=4), 1, 4, options=options)


def test_one_rank_alone_needs_no_group() -> None:
    options = eplb.RebalancerOptions(dispatch="balanced")
    topology = eplb.Topology(num_ranks=1, num_slots=6)
    placement = random_placement(1, 4, 6, 2)
    balancer = eplb.Rebalancer(topology, 1, 4, options=options, placement=placement)
    ids = torch.tensor([[0, 1], [2, -1], [3, 0]])
    slots = balancer.physical(0, ids)
    held = placement.physical_to_logical[0][slots.clamp(min=0)]
    assert torch.equal(torch.where(ids >= 0, held, -1), ids)


def serve_with_plans(rank: int) -> list[tuple[float, float]]:
    topology = eplb.Topology(num_ranks=4, num_slots=SLOTS)
    options = eplb.RebalancerOptions(mode="sync", interval=8, history=2, dispatch="balanced", samples=8)
    balancer = eplb.Rebalancer(topology, LAYERS, LOGICAL, options=options)
    told = []
    for step in range(32):
        for layer in range(LAYERS):
            ids = batch(step, layer, rank)
            balancer.record(layer, ids)
            balancer.physical(layer, ids)
        report = balancer.step()
        if report is not None:
            assert not report.failed, report.reason
            told.append((report.sampled_balancedness_even, report.sampled_balancedness))
    samples = balancer.window.samples()
    assert samples.shape == (16, LAYERS, LOGICAL)
    assert torch.equal(samples[-1, 0], sum(counts_of(batch(31, 0, source), LOGICAL) for source in range(4)))
    return told


def test_the_loop_plans_for_its_dispatch_from_single_steps() -> None:
    told, *others = run_ranks(serve_with_plans, 4)
    assert all(other == told for other in others)
    assert told[-1][1] > told[0][1] + 0.02
    assert all(balanced >= even for even, balanced in told)


def test_plans_are_for_the_dispatch_of_the_loop() -> None:
    topology = eplb.Topology(num_ranks=1, num_slots=6)
    for given, expected in (
        ({}, "even"),
        ({"dispatch": "local_first"}, "even"),
        ({"dispatch": "balanced"}, "balanced"),
        ({"dispatch": "balanced", "batch": "own"}, "even"),
        ({"dispatch": "balanced", "samples": 0}, "even"),
    ):
        options = eplb.RebalancerOptions(**given)  # type: ignore[arg-type]
        assert eplb.Rebalancer(topology, 1, 4, options=options).planner.dispatch == expected
    even = eplb.PlannerOptions(dispatch="even")
    options = eplb.RebalancerOptions(dispatch="balanced")
    assert eplb.Rebalancer(topology, 1, 4, options=options, planner=even).planner.dispatch == "even"


def test_a_plan_for_a_dispatch_that_is_not_there_is_refused() -> None:
    for options in ({"dispatch": "even"}, {"dispatch": "balanced", "samples": 0}):
        with pytest.raises(eplb.ConfigError, match=r"planner\.dispatch='balanced' needs"):
            eplb.Rebalancer(
                eplb.Topology(num_ranks=1, num_slots=6),
                1,
                4,
                options=eplb.RebalancerOptions(**options),  # type: ignore[arg-type]
                planner=eplb.PlannerOptions(dispatch="balanced"),
            )
