"""Tensors that have a row for each slot and do not move: which are named, and which are not."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from eplb_plugin.runtime.verify.unregistered import unregistered_tensors, warn_unregistered

SLOTS = 9


class Experts(nn.Module):
    """What holds the experts of a layer: weights that move, and whatever a test adds."""

    def __init__(self) -> None:
        super().__init__()
        self.w13 = nn.Parameter(torch.randn(SLOTS, 4, 6))
        self.w2 = nn.Parameter(torch.randn(SLOTS, 3, 4), requires_grad=False)

    @property
    def weights(self) -> list[torch.Tensor]:
        return [self.w13.data, self.w2.data]


@pytest.fixture
def experts() -> Experts:
    return Experts()


def names(experts: nn.Module, weights: list[torch.Tensor], slots: int = SLOTS) -> list[str]:
    return [found.split(" ")[0] for found in unregistered_tensors(experts, weights, slots)]


def test_registered_memory_is_not_named(experts: Experts) -> None:
    w13, w2 = experts.w13, experts.w2
    assert unregistered_tensors(experts, experts.weights, SLOTS) == []
    # In whatever form it moves: flat, transposed, as other bytes, or a part of its slots.
    assert names(experts, [w13.data.view(SLOTS, -1), w2.data.transpose(1, 2)]) == []
    assert names(experts, [w13.data.view(torch.int32), w2.data[: SLOTS - 1]]) == []
    assert unregistered_tensors(experts, [w2], SLOTS) == ["w13 (9, 4, 6) float32"]
    assert unregistered_tensors(experts, [], SLOTS, name="layers.3.experts") == [
        "layers.3.experts.w13 (9, 4, 6) float32",
        "layers.3.experts.w2 (9, 3, 4) float32",
    ]


def test_a_copy_of_registered_memory_is_named(experts: Experts) -> None:
    experts.shuffled = nn.Parameter(experts.w2.data.clone())
    experts.same = nn.Parameter(experts.w2.data)
    assert names(experts, experts.weights) == ["shuffled"]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.uint8, torch.int32]
)
def test_parameters_buffers_and_plain_attributes_are_named(experts: Experts, dtype: torch.dtype) -> None:
    values = torch.arange(SLOTS * 2).view(SLOTS, 2).to(dtype)
    kind = str(dtype).removeprefix("torch.")
    experts.w13_scale = nn.Parameter(values.clone(), requires_grad=False)
    experts.register_buffer("zero_points", values.clone())
    experts.alphas = values.clone()
    experts.method = nn.Module()
    experts.method.register_buffer("scales", values.clone(), persistent=False)
    experts.again = experts.w13_scale
    assert unregistered_tensors(experts, experts.weights, SLOTS) == [
        f"{name} (9, 2) {kind}" for name in ("w13_scale", "zero_points", "alphas", "method.scales")
    ]


def test_one_number_for_each_slot_is_named_unless_it_is_an_integer(experts: Experts) -> None:
    experts.scale = nn.Parameter(torch.rand(SLOTS))
    experts.register_buffer("expert_map", torch.arange(SLOTS, dtype=torch.int32))
    experts.register_buffer("tokens", torch.arange(SLOTS))
    assert names(experts, experts.weights) == ["scale"]


def test_what_slots_share_is_not_named(experts: Experts) -> None:
    experts.input_scale = nn.Parameter(torch.full((SLOTS,), 0.25))
    experts.register_buffer("broadcast", torch.rand(1, 4).expand(SLOTS, 4))
    experts.register_buffer("workspace", torch.zeros(SLOTS, 128))
    experts.register_buffer("absent", None)
    experts.register_buffer("nothing", torch.rand(SLOTS, 0))
    experts.register_buffer("number", torch.tensor(9.0))
    experts.register_buffer("meta", torch.empty(SLOTS, 3, device="meta"))
    experts.register_buffer("sparse", torch.rand(SLOTS, 3).to_sparse())
    assert names(experts, experts.weights) == []


def test_per_logical_expert_is_named_on_a_single_rank_only(experts: Experts) -> None:
    """The false alarm that stays."""
    experts.e_score_correction_bias = nn.Parameter(torch.rand(32))
    experts.gate = nn.Linear(6, 32, bias=False)
    assert names(experts, experts.weights) == []
    alone = Experts()
    alone.e_score_correction_bias = nn.Parameter(torch.rand(SLOTS))
    assert names(alone, alone.weights) == ["e_score_correction_bias"]


def test_one_slot_on_a_rank() -> None:
    module = nn.Module()
    module.weight = nn.Parameter(torch.rand(1, 4))
    module.scale = nn.Parameter(torch.ones(1))
    assert names(module, [module.weight], 1) == ["scale"]


def test_transposed_scales_are_named(experts: Experts) -> None:
    """Slots whose values do not lie in one piece cannot be compared, so they count as different."""
    experts.scale = nn.Parameter(torch.rand(SLOTS, 4, 3).transpose(1, 2))
    assert unregistered_tensors(experts, experts.weights, SLOTS) == ["scale (9, 3, 4) float32"]


class Wrapped(torch.Tensor):
    """A tensor that wraps two others, as quantisation libraries make them."""

    def __new__(cls, data: torch.Tensor, scale: torch.Tensor) -> Wrapped:
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=torch.float32)

    def __init__(self, data: torch.Tensor, scale: torch.Tensor) -> None:
        self.data_int8, self.scale = data, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["data_int8", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner, context, size, stride):  # type: ignore[no-untyped-def]
        return Wrapped(inner["data_int8"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        raise NotImplementedError(func)


def test_wrapped_tensors_are_looked_into(experts: Experts) -> None:
    experts.wrapped = Wrapped(torch.arange(SLOTS * 2, dtype=torch.int8).view(SLOTS, 2), torch.rand(SLOTS, 1))
    assert names(experts, experts.weights) == ["wrapped.data_int8", "wrapped.scale"]
    assert names(experts, [*experts.weights, experts.wrapped.data_int8]) == ["wrapped.scale"]


def test_one_warning_names_all(caplog: pytest.LogCaptureFixture) -> None:
    layers = [Experts() for _ in range(7)]
    weights = [layer.weights for layer in layers]
    with caplog.at_level(logging.WARNING):
        assert warn_unregistered(layers, weights, SLOTS) == 0
        assert caplog.records == []
        for number in (0, 2, 3, 4):
            layers[number].w13_weight_scale = nn.Parameter(torch.rand(SLOTS, 2))
            layers[number].register_buffer("alphas", torch.rand(SLOTS))
        layers[6].odd = torch.rand(SLOTS, 1).half()
        assert warn_unregistered(layers, weights, SLOTS) == 9
        assert warn_unregistered(layers[2:5], weights[2:5], SLOTS, numbers=[58, 59, 60]) == 6
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith("tensors with a row for each of 9 slots do not move with the experts")
    assert first.endswith(
        "layers 0, 2-4: w13_weight_scale (9, 2) float32, alphas (9,) float32; layer 6: odd (9, 1) float16"
    )
    assert second.endswith("layers 58-60: w13_weight_scale (9, 2) float32, alphas (9,) float32")
