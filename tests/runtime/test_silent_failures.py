"""Weights that look right at the start and are not: named before the first plan, counted, and shown."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import eplb_plugin as eplb
from eplb_plugin.observability.prometheus import WARNING_CAUSES
from eplb_plugin.runtime.rebalancer import Rebalancer
from tests.processes import run_ranks
from tests.runtime.test_rebalancer import LAYERS, LOGICAL, PAIR, make_weights, options
from tests.series import fetch

Outcome = tuple[list[str], dict[str, int], dict[str, float]]
"""Warnings in the log, `Rebalancer.warnings`, and the counter of each cause on the first rank."""


def layers_of(weights: list[list[torch.Tensor]]) -> list[torch.nn.Module]:
    """Modules whose parameters are these weights, each with a quantisation method that is no module."""
    modules = []
    for tensors in weights:
        module = torch.nn.Module()
        for place, tensor in enumerate(tensors):
            module.register_parameter(f"w{place}", torch.nn.Parameter(tensor, requires_grad=False))
        module.method = SimpleNamespace(config=SimpleNamespace(shared=torch.rand(1).expand(len(tensors[0]))))
        modules.append(module)
    return modules


def start(rank: int, fault: str) -> Outcome:
    weights = make_weights(PAIR, rank)
    modules = layers_of(weights)
    moved = weights
    if fault == "not loaded" and rank == 1:
        # The redundant slots are the last four, and replicate experts 0 to 3.
        for tensors in weights[1:]:
            for tensor in tensors:
                tensor[-2:] = 7
    if fault == "derived" and rank == 1:
        # On rank 0 the slots happen to have equal values.
        for module, tensors in zip(modules[1:], weights[1:], strict=True):
            module.method.config.alphas = tensors[1].sum(1) + torch.arange(10.0)
    if fault == "plain attributes":
        for module in modules:
            weight = module.w0.data
            del module.w0
            module.w0 = weight
        moved = [tensors[1:] for tensors in weights]

    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("eplb_plugin").addHandler(handler)
    balancer = Rebalancer(
        PAIR, LAYERS, LOGICAL, weights=moved, options=options(verify="sampled"), modules=modules
    )
    server = eplb.serve_metrics(balancer, eplb.MetricsOptions(enabled=True, port=0), model="tiny")
    shown: dict[str, float] = {}
    if server is not None:
        values = fetch(server.port)
        shown = {cause: values[f"eplb_warnings_total{{{cause},tiny}}"] for cause in WARNING_CAUSES}
    if fault == "not loaded":
        # Loading again makes it right; loading wrong ones again is told again.
        before = balancer.warnings.copy()
        with balancer.replacing_weights():
            for old, new in zip(weights, make_weights(PAIR, rank), strict=True):
                for tensor, right in zip(old, new, strict=True):
                    tensor.copy_(right)
        assert balancer.warnings == before
        with balancer.replacing_weights():
            if rank == 0:
                weights[0][1][0] += 1
        assert balancer.warnings["differing_replicas"] == 2
        if server is not None:
            assert fetch(server.port)["eplb_warnings_total{differing_replicas,tiny}"] == 2
        balancer.warnings = before
    balancer.close()
    if server is not None:
        server.close()
    return lines, dict(balancer.warnings), shown


UNMOVED = (
    "tensors with a row for each slot do not move with the experts; if they belong to experts, answers are "
)
CASES = {
    # vllm 37322. Experts 2 and 3 have their second replica in the last two slots.
    "not loaded": (
        "differing_replicas",
        "4 of 48 experts have replicas with different weights, so answers depend on the replica that serves "
        "a token, and moves of these are not verified; the first (layer, expert): "
        "(1, 2), (1, 3), (2, 2), (2, 3)",
    ),
    # vllm 34646 and 37217
    "derived": (
        "unmoved_tensors",
        f"{UNMOVED}wrong after a rebalance: layers 1-2: method.config.alphas (10,) float32",
    ),
    # vllm 47588
    "plain attributes": (
        "unmoved_tensors",
        f"{UNMOVED}wrong after a rebalance: layers 0-2: w0 (10, 6, 5) bfloat16",
    ),
}


@pytest.mark.parametrize("fault", CASES)
def test_it_is_named_counted_and_shown_before_the_first_plan(fault: str) -> None:
    cause, line = CASES[fault]
    (told, counted, shown), (told_elsewhere, counted_elsewhere, _) = run_ranks(start, 2, fault)
    assert told[0] == line
    assert told_elsewhere == []
    assert counted == counted_elsewhere == {cause: 1}
    assert shown == {other: float(other == cause) for other in WARNING_CAUSES}


def test_nothing_is_told_of_sound_weights_and_a_scale_that_was_expanded() -> None:
    found: list[Any] = run_ranks(start, 2, "none")
    assert [(told, counted) for told, counted, _ in found] == [([], {}), ([], {})]
    assert set(found[0][2].values()) == {0.0}
