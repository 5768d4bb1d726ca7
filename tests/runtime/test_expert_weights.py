"""Weights of any dtype as rows of bytes, and the layouts that are refused."""

from __future__ import annotations

import pytest
import torch

import eplb_plugin as eplb
from eplb_plugin.runtime.weights.expert_weights import ExpertWeights, byte_rows

TOPOLOGY = eplb.Topology(num_ranks=2, num_slots=6)
DTYPES = sorted(
    {
        value
        for value in vars(torch).values()
        if isinstance(value, torch.dtype) and not str(value).startswith("torch.q")
    },
    key=str,
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_every_dtype_is_written_through_its_bytes(dtype: torch.dtype) -> None:
    tensor = torch.empty(3, 2, 4, dtype=dtype)
    rows = byte_rows(tensor, "t", 3)
    assert rows.shape == (3, 8 * tensor.element_size())
    assert rows.data_ptr() == tensor.data_ptr()
    rows[1] = torch.arange(rows.shape[1]) % 2
    again = byte_rows(tensor, "t", 3)
    assert torch.equal(again[1], rows[1])


def test_rows_may_lie_apart_and_scalars_per_slot_work() -> None:
    whole = torch.arange(24, dtype=torch.int32).view(3, 8)
    rows = byte_rows(whole[:, 2:5], "t", 3)
    rows[2] = rows[0].clone()
    assert whole[2].tolist() == [16, 17, 2, 3, 4, 21, 22, 23]
    assert byte_rows(torch.zeros(3, dtype=torch.float64), "t", 3).shape == (3, 8)
    assert byte_rows(torch.zeros(3, 0), "t", 3).shape == (3, 0)
    parameter = torch.nn.Parameter(torch.zeros(3, 2))
    byte_rows(parameter, "t", 3)[0] = 63
    assert parameter[0, 0] != 0


def test_rows_of_tensors_made_in_inference_mode_stay_writable() -> None:
    with torch.inference_mode():
        rows = byte_rows(torch.zeros(3, 2), "t", 3)
    rows[0] = 1


@pytest.mark.filterwarnings("ignore")
def test_layouts_that_do_not_move_are_refused() -> None:
    for tensor, rule in [
        (torch.zeros(4, 2), r"\(4, 2\).*3 on this rank"),
        (torch.zeros(()), "slots first"),
        (torch.zeros(1).expand(3), "0 bytes apart, 4 each"),
        (torch.zeros(3, 4, 2).transpose(1, 2), "do not lie in one piece"),
        (torch.zeros(3, 2).to_sparse(), "layout"),
        (torch.zeros(3, 2, dtype=torch.complex64).conj(), "resolve_conj"),
        ([1, 2], "list, not a tensor"),
        (
            torch.quantize_per_channel(torch.zeros(3, 2), torch.ones(3), torch.zeros(3), 0, torch.qint8),
            "quantisation",
        ),
    ]:
        with pytest.raises(eplb.TransferError, match=rule):
            ExpertWeights([[tensor]], TOPOLOGY)
    shared = torch.zeros(3, 2)
    with pytest.raises(eplb.TransferError, match="tensor 0 of layer 1 starts at the memory of tensor 1"):
        ExpertWeights([[torch.zeros(3), shared], [shared]], TOPOLOGY)
    with pytest.raises(eplb.TransferError, match="one tensor, not a list"):
        ExpertWeights([shared], TOPOLOGY)
    with pytest.raises(eplb.TransferError, match="on meta, others are on cpu"):
        ExpertWeights([[shared, torch.zeros(3, 2, device="meta")]], TOPOLOGY)


def test_sizes_and_signature() -> None:
    weights = ExpertWeights([[torch.zeros(3, 5), torch.zeros(3)], [], [torch.zeros(3, 0)]], TOPOLOGY)
    assert weights.expert_bytes == [24, 0, 0]
    assert len(weights.rows) == 3
    other = ExpertWeights([[torch.zeros(3, 5), torch.zeros(3, dtype=torch.int32)], []], TOPOLOGY)
    assert weights.signature != other.signature
