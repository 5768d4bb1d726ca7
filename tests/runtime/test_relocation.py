"""A relocation of several migration batches: a failure is told to all ranks, and earlier batches stay."""

from __future__ import annotations

import pkgutil
from collections.abc import Sequence
from contextlib import nullcontext
from unittest import mock

import pytest
import torch

import eplb_plugin as eplb
from eplb_plugin.runtime.control.scheduling import AtOnce
from eplb_plugin.runtime.rebalancer import Rebalancer
from eplb_plugin.runtime.relocation import relocate
from eplb_plugin.runtime.reports import DraftReport
from eplb_plugin.runtime.weights.transport import Message, Transport
from tests.processes import run_ranks
from tests.runtime.cases import fill, wrong_rows

LAYERS, SLOTS = 4, 4
TOPOLOGY = eplb.Topology(num_ranks=2, num_slots=SLOTS)
# Each rank gets two experts of each layer, 400 KiB each and one small row: one layer takes up 0.8 MiB.
KIB = 400


def fail_once(rank: int, place: str, name: str, batch: int) -> tuple[str, list[bool], int]:
    """Rank 1 fails in its `batch`-th call: what all are told, which layers have changed, messages sent."""
    weights = [[torch.empty(2, KIB << 10, dtype=torch.uint8), torch.empty(2, 3)] for _ in range(LAYERS)]
    mine = TOPOLOGY.slots_of_rank(rank)
    start = eplb.Placement.default(LAYERS, SLOTS, SLOTS)
    for layer in range(LAYERS):
        fill(weights[layer], layer, start.physical_to_logical[layer, mine].tolist())
    options = eplb.RebalancerOptions(mode="sync", staging_mib=1)
    balancer = Rebalancer(TOPOLOGY, LAYERS, SLOTS, weights=weights, options=options)
    context = balancer._context
    goal = start.physical_to_logical.flip(1)

    owner = pkgutil.resolve_name(f"eplb_plugin.runtime.weights.{place}")
    works, calls, sent = getattr(owner, name), [0], [0]

    def fails(*arguments: object) -> object:
        calls[0] += 1
        if calls[0] == batch:
            raise MemoryError("nothing left today")
        return works(*arguments)

    send = Transport.start

    def sends(self: Transport, outgoing: Sequence[Message], incoming: Sequence[Message]) -> object:
        sent[0] += len(outgoing)
        return send(self, outgoing, incoming)

    patched = mock.patch.object(owner, name, fails) if rank else nullcontext()
    counted = mock.patch.object(Transport, "start", sends)
    with counted, patched, pytest.raises(eplb.TransferError) as caught:
        relocate(context, 1, goal, AtOnce(), DraftReport())
    now = balancer.placement
    changed = (now.physical_to_logical != start.physical_to_logical).any(1).tolist()
    assert wrong_rows(weights, now, mine) == []
    before = sent[0]
    # The next one goes on from there.
    draft = DraftReport()
    relocate(context, 2, goal, AtOnce(), draft)
    assert draft.notes == []
    assert balancer.placement == eplb.Placement(goal, SLOTS)
    assert wrong_rows(weights, balancer.placement, mine) == []
    balancer.close()
    return str(caught.value), changed, before


def test_without_memory_on_one_rank_nobody_sends_anything() -> None:
    one, other = run_ranks(fail_once, 2, "staging:Staging", "reserve", 1)
    assert one == other
    told, changed, sent = one
    assert "rank 1: MemoryError: nothing left today" in told
    assert changed == [False] * LAYERS
    assert sent == 0


@pytest.mark.parametrize("batch", [1, 3])
def test_a_rank_that_fails_in_a_batch_still_sends_and_nobody_keeps_what_it_sent(batch: int) -> None:
    one, other = run_ranks(fail_once, 2, "transfer", "_copy", batch)
    assert one == other
    told, changed, sent = one
    assert "rank 1: MemoryError: nothing left today" in told
    assert changed == [layer + 1 < batch for layer in range(LAYERS)]
    # In each batch two experts, and their small rows together.
    assert sent == 3 * batch
