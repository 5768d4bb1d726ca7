"""The model on several processes gives the outputs of one, before and after rebalances; and can fail to."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

import eplb_plugin as eplb
from eplb_plugin.integration.torch_moe import MoEConfig, MoEModel, expert_tensors
from eplb_plugin.runtime.weights.transfer import Transfer
from tests.processes import run_ranks

CONFIG = MoEConfig(vocab=64, num_topics=4, hidden=16, expert_hidden=24, num_layers=3, num_logical=12, top_k=3)
PLANNER = eplb.PlannerOptions(move_price=0.009)


def batch(step: int, rank: int) -> torch.Tensor:
    """Token ids of a topic that changes every four steps; rank 1 has none in every third step."""
    generator = torch.Generator().manual_seed(step * 10 + rank)
    tokens = 0 if rank == 1 and step % 3 == 0 else 20 + 5 * rank
    topic = step // 4 % CONFIG.num_topics
    return torch.randint(CONFIG.vocab // 4, (tokens,), generator=generator) * 4 + topic


def same(logits: torch.Tensor, expected: torch.Tensor) -> bool:
    close = torch.allclose(logits, expected, rtol=1e-4, atol=1e-5)
    return close and torch.equal(logits.argmax(-1), expected.argmax(-1))


def serve(rank: int, size: int, dispatch: str, batch_of: str) -> tuple[int, float, float]:
    topology = eplb.Topology(num_ranks=size, num_slots=16)
    options = eplb.RebalancerOptions(mode="sync", interval=4, history=1, dispatch=dispatch, batch=batch_of)
    model = MoEModel(CONFIG, topology, options=options, planner=PLANNER)
    reference = MoEModel(CONFIG)
    moves, before, after = 0, 0.0, 0.0
    for step in range(16):
        tokens = batch(step, rank)
        assert same(model.forward(tokens), reference.forward(tokens)), f"step {step}"
        report = model.step(is_dummy=not tokens.numel())
        if report:
            assert model.wrong_slots() == 0
            moves, before, after = (
                moves + report.moves,
                before + report.balancedness_before,
                after + report.balancedness_after,
            )
    return moves, before, after


@pytest.mark.parametrize(
    ("size", "dispatch", "batch_of"),
    [
        (2, "local_first", "sharded"),
        (4, "even", "sharded"),
        (4, "balanced", "sharded"),
        (2, "balanced", "own"),
    ],
)
def test_outputs_are_those_of_one_process(size: int, dispatch: str, batch_of: str) -> None:
    results = run_ranks(serve, size, size, dispatch, batch_of)
    assert all(result == results[0] for result in results)
    moves, before, after = results[0]
    assert moves > 0
    assert after > before


def serve_without_moving(rank: int) -> tuple[bool, bool, int]:
    model = MoEModel(
        CONFIG,
        eplb.Topology(num_ranks=2, num_slots=16),
        options=eplb.RebalancerOptions(interval=4),
        planner=PLANNER,
    )
    reference = MoEModel(CONFIG)
    tokens = batch(1, rank)
    before = same(model.forward(tokens), reference.forward(tokens))
    model.step()
    with mock.patch.object(Transfer, "commit"):
        model.rebalancer.rebalance()
    after = same(model.forward(tokens), reference.forward(tokens))
    return before, after, model.wrong_slots()


def test_a_map_without_its_weights_is_noticed() -> None:
    results = run_ranks(serve_without_moving, 2)
    assert all(before for before, _, _ in results)
    assert not all(after for _, after, _ in results)
    assert sum(wrong for _, _, wrong in results) > 0


def test_the_reference_is_the_formula() -> None:
    """One process against a loop over tokens and experts, straight from the definition."""
    model = MoEModel(CONFIG)
    tokens = batch(2, 0)[:5]
    logits = model.forward(tokens)
    for token, got in zip(tokens, logits, strict=True):
        x = model.embedding[token]
        for layer in range(CONFIG.num_layers):
            normed = x / (x.square().mean() + torch.finfo(x.dtype).eps).sqrt()
            probability = (model.routers[layer] @ normed).softmax(0)
            weight, chosen = probability.topk(CONFIG.top_k)
            for w, expert in zip(weight / weight.sum(), chosen.tolist(), strict=True):
                gate, up, down, scale = expert_tensors(CONFIG, layer, expert)
                a = gate @ normed
                x = x + w * scale * (down @ (a * a.sigmoid() * (up @ normed)))
        normed = x / (x.square().mean() + torch.finfo(x.dtype).eps).sqrt()
        assert torch.allclose(model.head @ normed, got, rtol=1e-4, atol=1e-5)


def test_topics_choose_different_experts() -> None:
    model = MoEModel(CONFIG)
    loads = []
    for topic in range(2):
        model.forward(torch.arange(16) * 4 + topic)
        model.step()
        loads.append(model.rebalancer.window.take().snapshots[0].double())
    within = torch.cosine_similarity(*loads, dim=1)
    assert (within < 0.8).all()
    assert loads[0].sum(1).tolist() == [16.0 * 3] * 3


def test_padding_is_not_counted() -> None:
    model = MoEModel(CONFIG)
    model.forward(torch.arange(10), torch.arange(10) < 4)
    model.step()
    assert model.rebalancer.window.take().snapshots.sum() == 4 * CONFIG.top_k * CONFIG.num_layers


def test_weights_depend_on_seed_layer_and_expert_alone() -> None:
    a, b = expert_tensors(CONFIG, 1, 2), expert_tensors(CONFIG, 1, 2)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    other = MoEConfig(**CONFIG.model_dump() | {"seed": 1})
    for different in (
        expert_tensors(CONFIG, 1, 3),
        expert_tensors(CONFIG, 2, 2),
        expert_tensors(other, 1, 2),
    ):
        assert not torch.equal(a[0], different[0])
