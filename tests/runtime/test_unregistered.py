"""Tensors that have a row for each slot and do not move: which are named, and which are not."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from eplb_plugin.runtime.control.rank_group import RankGroup
from eplb_plugin.runtime.verify.unregistered import (
    describe_unregistered,
    find_unregistered,
    search_unregistered,
    unregistered_tensors,
)
from tests.processes import run_ranks

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


@dataclass
class Descriptor:
    """As an engine keeps what a quantisation derives: no module, and made once, after loading."""

    scale: object = None


@dataclass
class Configuration:
    weight: Descriptor = field(default_factory=Descriptor)
    activation: Descriptor = field(default_factory=Descriptor)


def quantised(experts: Experts) -> Configuration:
    """Two objects away from the module: module, method, configuration, descriptor, tensor."""
    experts.method = SimpleNamespace(configuration=Configuration())
    return experts.method.configuration


def test_a_vector_that_was_derived_and_cached_outside_of_the_parameters_is_named(experts: Experts) -> None:
    """vllm 34646 and 37217: the product of two scales goes stale when its experts move."""
    configuration = quantised(experts)
    assert names(experts, experts.weights) == []
    configuration.weight.scale = experts.w13.data.abs().amax((1, 2)) * 0.5
    assert unregistered_tensors(experts, experts.weights, SLOTS) == [
        "method.configuration.weight.scale (9,) float32"
    ]
    # A view of what moves follows it.
    configuration.weight.scale = experts.w13.data[:, 0, 0]
    assert names(experts, experts.weights) == []


def test_a_scale_that_was_expanded_is_left_alone(experts: Experts) -> None:
    """vllm 37217: one number for all slots, stride 0. It is the same wherever an expert goes."""
    configuration = quantised(experts)
    shared = torch.rand(1).expand(SLOTS)
    assert shared.stride() == (0,)
    configuration.activation.scale = shared
    experts.w13_input_scale = nn.Parameter(shared, requires_grad=False)
    experts.register_buffer("w2_input_scale", torch.rand(1, 3).expand(SLOTS, 3))
    assert names(experts, experts.weights) == []
    configuration.activation.scale = torch.rand(SLOTS)
    assert names(experts, experts.weights) == ["method.configuration.activation.scale"]


def test_weights_as_plain_attributes_are_named_beside_scales_that_move() -> None:
    """vllm 47588: what moves are the parameters, and those are the scales alone."""
    experts = nn.Module()
    experts.w13_weight = torch.rand(SLOTS, 4, 6)
    experts.w2_weight = torch.rand(SLOTS, 3, 4)
    experts.w13_scale = nn.Parameter(torch.rand(SLOTS, 4))
    experts.w2_scale = nn.Parameter(torch.rand(SLOTS, 3))
    assert unregistered_tensors(experts, list(experts.parameters()), SLOTS) == [
        "w13_weight (9, 4, 6) float32",
        "w2_weight (9, 3, 4) float32",
    ]


def test_lists_and_dictionaries_are_looked_into(experts: Experts) -> None:
    experts.packed = (torch.zeros(2), torch.rand(SLOTS, 2))
    experts.by_name = {"scale": torch.rand(SLOTS, 3), 4: [torch.rand(SLOTS, 5)], None: torch.rand(SLOTS, 6)}
    assert names(experts, experts.weights) == ["packed[1]", "by_name['scale']", "by_name[4][0]"]


def test_a_list_with_one_tensor_for_each_slot_is_named_as_one(experts: Experts) -> None:
    experts.weight_list = list(torch.rand(SLOTS, 2, 3).unbind())
    experts.scale_list = [torch.tensor(float(slot)) for slot in range(SLOTS)]
    experts.views = list(experts.w13.data.unbind())
    experts.alike = [torch.ones(2, 3) for _ in range(SLOTS)]
    experts.too_few = [torch.rand(2, 3) for _ in range(SLOTS - 1)]
    experts.uneven = [torch.rand(2, 3 + slot) for slot in range(SLOTS)]
    assert unregistered_tensors(experts, experts.weights, SLOTS) == [
        "weight_list 9 of (2, 3) float32",
        "scale_list 9 of () float32",
    ]


def test_circles_and_deep_objects_end_the_search(experts: Experts) -> None:
    """Objects refer to each other, and to other layers: each is looked at once, and no module is entered."""
    configuration = quantised(experts)
    experts.method.back = experts.method
    experts.method.model = SimpleNamespace(other_layer=Experts())
    scales = torch.rand(SLOTS)
    configuration.activation.scale = within(3, scales)
    assert names(experts, experts.weights) == ["method.configuration.activation.scale.of.of.of"]
    configuration.activation.scale = far = within(4, scales)
    assert names(experts, experts.weights) == [], "seven objects away"
    # Reached by a shorter way as well, after the long one.
    experts.near = far.of
    assert names(experts, experts.weights) == ["near.of.of.of"]


def within(objects: int, tensor: torch.Tensor) -> SimpleNamespace:
    """A tensor in so many objects, one in the other."""
    return SimpleNamespace(of=within(objects - 1, tensor) if objects > 1 else tensor)


def test_what_layers_share_is_named_once() -> None:
    layers = [Experts(), Experts()]
    shared = SimpleNamespace(scales=torch.rand(SLOTS))
    for layer in layers:
        layer.config = shared
    found = find_unregistered(layers, [layer.weights for layer in layers], SLOTS)
    assert found == {"config.scales (9,) float32": [0]}


def test_one_line_names_all() -> None:
    layers = [Experts() for _ in range(7)]
    weights = [layer.weights for layer in layers]
    assert find_unregistered(layers, weights, SLOTS) == {}
    assert describe_unregistered([{}, {}]) == ""
    for number in (0, 2, 3, 4):
        layers[number].w13_weight_scale = nn.Parameter(torch.rand(SLOTS, 2))
        layers[number].register_buffer("alphas", torch.rand(SLOTS))
    layers[6].odd = torch.rand(SLOTS, 1).half()
    found = find_unregistered(layers, weights, SLOTS)
    assert sum(map(len, found.values())) == 9
    line = describe_unregistered([found])
    assert line.startswith("tensors with a row for each slot do not move with the experts")
    assert line.endswith(
        "layers 0, 2-4: w13_weight_scale (9, 2) float32, alphas (9,) float32; layer 6: odd (9, 1) float16"
    )
    some = find_unregistered(layers[2:5], weights[2:5], SLOTS, numbers=[58, 59, 60])
    assert describe_unregistered([some]).endswith(
        "layers 58-60: w13_weight_scale (9, 2) float32, alphas (9,) float32"
    )
    # Ranks together: a tensor counts that one of them alone has found.
    others = {"alphas (9,) float32": [2, 57], "own (9, 3) float32": [57]}
    assert describe_unregistered([some, {}, others]).endswith(
        "layers 58-60: w13_weight_scale (9, 2) float32; layers 2, 57-60: alphas (9,) float32; "
        "layer 57: own (9, 3) float32"
    )


def search(rank: int) -> str:
    """Two ranks: the slots of rank 0 happen to have equal scales, and rank 2 has no modules to show."""
    layer = Experts()
    layer.scales = torch.full((SLOTS,), 0.5) if rank == 0 else torch.rand(SLOTS)
    layers = [] if rank == 2 else [layer]
    return search_unregistered(RankGroup(), layers, [layer.weights for layer in layers], SLOTS)


def test_all_ranks_learn_what_one_has_found() -> None:
    lines = run_ranks(search, 3)
    assert lines[0].endswith(": layer 0: scales (9,) float32")
    assert lines == [lines[0]] * 3
