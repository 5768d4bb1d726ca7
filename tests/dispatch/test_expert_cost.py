"""`expert_cost: auto`: the table of accelerators, and the cost from bytes, parameters and rates."""

from __future__ import annotations

import pytest
import torch

import eplb_plugin as eplb
from eplb_plugin.advisor.machine import model_preset
from eplb_plugin.dispatch.accelerators import ACCELERATORS, find_accelerator
from eplb_plugin.dispatch.expert_cost import cost_in_tokens, resolve_expert_cost, weight_bits

CUDA = torch.device("cuda:0")
HIDDEN, INNER = 64, 128


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch):
    def pretend(name: str) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)

    return pretend


def weights(dtype: torch.dtype, slots: int = 3, packed: int = 1) -> list[torch.Tensor]:
    """Gate and up in one, and down; `packed` weights in each element."""
    return [
        torch.empty(slots, 2 * INNER, HIDDEN // packed, dtype=dtype),
        torch.empty(slots, HIDDEN, INNER // packed, dtype=dtype),
    ]


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA A100-PCIE-40GB", "A100 40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB PCIe"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H800", "H100 SXM"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA H200 NVL", "H200 NVL"),
        ("NVIDIA H20", "H20"),
        ("NVIDIA H20-3e", "H20"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA GB200", "GB200"),
        ("NVIDIA L40S", "L40S"),
        ("AMD Instinct MI300X OAM", "MI300X"),
        ("AMD Instinct MI355X", "MI355X"),
        ("gb200", "GB200"),
        ("h100 sxm", "H100 SXM"),
    ],
)
def test_devices_are_found_by_their_names(device: str, name: str) -> None:
    assert find_accelerator(device).name == name


@pytest.mark.parametrize("device", ["NVIDIA L40", "NVIDIA GH200 480GB", "Tesla V100-SXM2-32GB", "cpu", ""])
def test_other_devices_are_not_taken_for_them(device: str) -> None:
    with pytest.raises(eplb.ConfigError, match=r"there are A100 40GB, .*MI355X"):
        find_accelerator(device)


def test_every_accelerator_is_found_by_its_name_and_has_a_source() -> None:
    for name, item in ACCELERATORS.items():
        assert find_accelerator(name) is item
        assert item.source
        assert item.bits4 >= item.bits16 <= item.bits8
        assert item.tflops(32) == item.bits16 / 2


def test_the_example_of_gpt_oss_on_an_h100(on_device) -> None:
    """By hand: 13.2 MB over 0.8 * 3.35 TB/s are 4.93 us; 2 * 24.9e6 over 0.4 * 989 TFLOPS are 0.126 us."""
    on_device("NVIDIA H100 80GB HBM3")
    wide = 2880
    tensors = [
        torch.empty(4, 2 * wide, wide // 2, dtype=torch.uint8, device="meta"),
        torch.empty(4, 2 * wide, wide // 32, dtype=torch.uint8, device="meta"),
        torch.empty(4, 2 * wide, dtype=torch.bfloat16, device="meta"),
        torch.empty(4, wide, wide // 2, dtype=torch.uint8, device="meta"),
        torch.empty(4, wide, wide // 32, dtype=torch.uint8, device="meta"),
        torch.empty(4, wide, dtype=torch.bfloat16, device="meta"),
    ]
    assert resolve_expert_cost("auto", tensors, CUDA) == round(4.93 / 0.126)
    preset = model_preset("gpt-oss-20b")
    bits = weight_bits(preset.bits_per_weight)
    held = {bits: 8 * preset.bytes_per_expert / preset.bits_per_weight}
    assert cost_in_tokens(ACCELERATORS["H100 SXM"], preset.bytes_per_expert, held) == 39


@pytest.mark.parametrize(
    ("dtype", "packed", "bits"),
    [
        (torch.float32, 1, 32),
        (torch.bfloat16, 1, 16),
        (torch.float16, 1, 16),
        (torch.float8_e4m3fn, 1, 8),
        (torch.int8, 1, 8),
        (torch.uint8, 2, 4),
        (torch.int32, 8, 4),
    ],
)
def test_parameters_come_from_shapes_and_dtypes(
    on_device, dtype: torch.dtype, packed: int, bits: int
) -> None:
    on_device("NVIDIA B200")
    tensors = weights(dtype, packed=packed)
    scales = [torch.empty(3, 2 * INNER, 1), torch.empty(3, 1)]
    held, b200 = 3 * HIDDEN * INNER, ACCELERATORS["B200"]
    size = sum(t.numel() * t.element_size() for t in [*tensors, *scales]) / 3
    wanted = round((size / 7.7e12 / 0.8) / (2 * held / (0.4e12 * b200.tflops(bits))))
    assert resolve_expert_cost("auto", [*tensors, *scales], CUDA) == wanted
    assert wanted > 10


def test_slots_and_layout_make_no_difference(on_device) -> None:
    on_device("NVIDIA H200")
    two = resolve_expert_cost("auto", weights(torch.bfloat16, slots=2), CUDA)
    assert two == resolve_expert_cost("auto", weights(torch.bfloat16, slots=7), CUDA)
    gate, up, down = (torch.empty(2, HIDDEN, INNER, dtype=torch.bfloat16) for _ in range(3))
    assert two == resolve_expert_cost("auto", [gate, up, down], CUDA)
    # By hand: 2 bytes a parameter over 3.84 TB/s, 2 operations over 395.6 TFLOPS.
    assert two == round((2 / 3.84) / (2 / 395.6))


def test_mixed_widths_take_their_times_together(on_device) -> None:
    on_device("NVIDIA H200")
    gate, down = weights(torch.bfloat16)[0], weights(torch.float8_e4m3fn)[1]
    held = {16: 2.0 * HIDDEN * INNER, 8: 1.0 * HIDDEN * INNER}
    wanted = cost_in_tokens(ACCELERATORS["H200"], 5 * HIDDEN * INNER, held)
    assert resolve_expert_cost("auto", [gate, down], CUDA) == wanted
    both = [cost_in_tokens(ACCELERATORS["H200"], bits // 8, {bits: 1.0}) for bits in (8, 16)]
    assert min(both) <= wanted <= max(both)


@pytest.mark.parametrize(
    ("bits", "width"), [(4, 4), (4.25, 4), (4.5, 4), (8.002, 8), (8.5, 8), (16, 16), (32, 32)]
)
def test_widths_of_models(bits: float, width: int) -> None:
    assert weight_bits(bits) == width


def test_a_number_is_taken_as_it_is() -> None:
    assert resolve_expert_cost(0, (), torch.device("cpu")) == 0
    assert resolve_expert_cost(32, (), torch.device("cpu")) == 32


def test_what_auto_cannot_know(on_device) -> None:
    with pytest.raises(
        eplb.ConfigError, match=r"knows A100 40GB, .*MI355X, not cpu; give expert_cost as a number"
    ):
        resolve_expert_cost("auto", weights(torch.bfloat16), torch.device("cpu"))
    with pytest.raises(eplb.ConfigError, match="'often' is neither a number of tokens nor 'auto'"):
        resolve_expert_cost("often", weights(torch.bfloat16), CUDA)
    on_device("Tesla V100-SXM2-32GB")
    with pytest.raises(
        eplb.ConfigError, match=r"is 'Tesla V100-SXM2-32GB'; there are A100 .*; give expert_cost"
    ):
        resolve_expert_cost("auto", weights(torch.bfloat16), CUDA)
    on_device("NVIDIA H200")
    for none in ([], [torch.empty(0, 4)], [torch.empty(())]):
        with pytest.raises(eplb.ConfigError, match="needs the weights of a layer"):
            resolve_expert_cost("auto", none, CUDA)
    with pytest.raises(eplb.ConfigError, match=r"does not know weights of torch\.int64"):
        resolve_expert_cost("auto", weights(torch.int64), CUDA)
