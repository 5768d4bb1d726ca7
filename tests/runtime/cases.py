"""Random placements, and expert weights whose every byte is known."""

from __future__ import annotations

import torch

import eplb_plugin as eplb
from eplb_plugin.runtime.weights.expert_weights import byte_rows


def random_placement(layers: int, logical: int, slots: int, seed: int) -> eplb.Placement:
    """Any placement at all: also several replicas of an expert on one rank."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(layers):
        spare = torch.randint(logical, (slots - logical,), generator=generator)
        ids = torch.cat([torch.arange(logical), spare])
        rows.append(ids[torch.randperm(slots, generator=generator)])
    return eplb.Placement(torch.stack(rows), logical)


def known_bytes(layer: int, tensor: int, expert: int, num_bytes: int) -> torch.Tensor:
    """The bytes of one tensor of one expert, uint8 [num_bytes], each 0 or 1: valid in every dtype."""
    generator = torch.Generator().manual_seed((layer * 100 + tensor) * 1000 + expert)
    return torch.randint(2, (num_bytes,), generator=generator, dtype=torch.uint8)


def fill(tensors: list[torch.Tensor], layer: int, experts: list[int]) -> None:
    """Write the known bytes of `experts` into the slots of a layer's tensors."""
    for index, tensor in enumerate(tensors):
        rows = byte_rows(tensor, "test", len(experts))
        for slot, expert in enumerate(experts):
            rows[slot] = known_bytes(layer, index, expert, rows.shape[1])


def wrong_rows(weights: list[list[torch.Tensor]], placement: eplb.Placement, slots: slice) -> list[str]:
    """Every tensor of every slot that does not hold what `placement` says, to the byte."""
    wrong = []
    for layer, experts in enumerate(placement.physical_to_logical[:, slots].tolist()):
        for index, tensor in enumerate(weights[layer]):
            rows = byte_rows(tensor, "test", len(experts))
            for slot, expert in enumerate(experts):
                if not torch.equal(rows[slot], known_bytes(layer, index, expert, rows.shape[1])):
                    wrong.append(f"layer {layer} slot {slot} tensor {index}")
    return wrong
