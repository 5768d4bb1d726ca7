"""Bytes of experts go wrong: on the way, where they are sent from, or in a slot. They never spread."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from eplb_plugin.runtime import relocation, repair
from eplb_plugin.runtime.context import Context
from eplb_plugin.runtime.rebalancer import RebalanceReport
from eplb_plugin.runtime.weights.staging import Arrival
from eplb_plugin.runtime.weights.transfer import Transfer
from tests.faults.cluster import Seat, run_cluster
from tests.faults.serving import SIZE, SLOTS_PER_RANK, SMALL, Service
from tests.faults.table import Record

# Tensors of which sampling leaves some bytes out.
CONFIG = SMALL.model_copy(update={"hidden": 32, "expert_hidden": 48})
SCALE = 3  # index of the tensor that holds one number per expert


@dataclass(frozen=True)
class Slot:
    """A slot of the rank that is damaged, counted on it."""

    layer: int
    index: int


class Damage:
    """Damages weights on one rank, and says on all ranks what came of it. All ranks call all of it."""

    def __init__(self, service: Service, victim: int) -> None:
        self.service = service
        self.victim = victim
        self.here = service.seat.rank == victim
        self.started = 0.0
        # Every rebalance looks at every layer, so that damage is found in the next one.
        repair.AUDIT_TURNS = 1

    def slots(self, replicated: bool) -> list[Slot]:
        """Those of the victim whose expert has replicas on other ranks too; or has no other at all."""
        now = self.service.balancer.placement
        mine = self.service.topology.slots_of_rank(self.victim)
        return [
            Slot(layer, index)
            for layer, experts in enumerate(now.physical_to_logical[:, mine].tolist())
            for index, expert in enumerate(experts)
            if experts.count(expert) == 1 and (int(now.replica_count[layer, expert]) > 1) == replicated
        ]

    def flip(self, slot: Slot) -> None:
        """The lowest bit of the first weight."""
        self.started = time.monotonic()
        if self.here:
            row = self.service.model.experts[slot.layer][0][slot.index].view(-1).view(torch.uint8)
            row[0] ^= 1

    def exchange(self, one: Slot, other: Slot) -> None:
        """The scales of two experts of a layer."""
        self.started = time.monotonic()
        if self.here:
            scale = self.service.model.experts[one.layer][SCALE]
            scale[[one.index, other.index]] = scale[[other.index, one.index]]

    def wrong(self) -> int:
        """Slots of all ranks that do not hold what the placement says."""
        total = torch.tensor([self.service.model.wrong_slots()])
        dist.all_reduce(total)
        return int(total)

    def until(self, wanted: Callable[[RebalanceReport], bool], *, sound: bool = False) -> RebalanceReport:
        """Serve until a rebalance is as wanted. `sound`: outputs have to be right all along."""
        self.started = self.started or time.monotonic()
        return self.service.until(wanted, sound=sound)

    def over(self) -> float:
        """Everything is right again and stays so; seconds that it took."""
        assert self.wrong() == 0
        seconds = time.monotonic() - self.started
        self.started = 0.0
        self.until(lambda report: report.moves > 0, sound=True)
        self.started = 0.0
        return seconds


def on_the_way(damage: Damage) -> dict[str, float]:
    """Bytes that arrive damaged are fetched again, and are never used."""
    check = relocation.corrupted_sources
    first = damage.service.topology.slots_of_rank(damage.victim).start
    flipped = []

    def flip(context: Context, arrivals: Sequence[Arrival], *arguments: Any) -> object:
        for arrival in arrivals:
            # What a rank copies from itself is not in the buffer.
            received = not first <= arrival.source_slot < first + SLOTS_PER_RANK
            if received and (arrival.layer == layer if each_time else not flipped):
                flipped.append(arrival)
                arrival.rows[0][0] ^= 1
        return check(context, arrivals, *arguments)

    each_time, layer = False, 1
    with mock.patch.object(relocation, "corrupted_sources", flip if damage.here else check):
        report = damage.until(lambda report: report.mismatches > 0, sound=True)
    assert report.mismatches == 1
    assert report.moves > 0
    assert report.reason == ""
    seconds = {"bit flipped on the way": damage.over()}

    each_time = True
    with mock.patch.object(relocation, "corrupted_sources", flip if damage.here else check):
        report = damage.until(lambda report: report.mismatches > 0, sound=True)
    assert report.mismatches == 2
    assert report.reason == f"experts of layer {layer} were corrupted in transfer more than once"
    seconds["bit flipped on the way, every time"] = damage.over()
    return seconds


def where_it_is_sent_from(damage: Damage, replicated: bool) -> float:
    """A source goes wrong after slots were verified: nobody uses it, and a sound replica replaces it."""
    fill_first, balancer = Transfer.fill_first, damage.service.balancer
    first = damage.service.topology.slots_of_rank(damage.victim).start
    flipped: list[torch.Tensor] = []

    def flip(self: Transfer) -> None:
        slots = {
            row.data_ptr(): (layer, first + index)
            for layer, tensors in enumerate(damage.service.model.experts)
            for index, row in enumerate(tensors[0])
        }
        sends = [send for each in self._staged.rounds for send in each.sends]
        for row in [row for message, fills in sends for row in (message.tensor, *(row for _, row in fills))]:
            if flipped or row.data_ptr() not in slots:
                continue
            place = slots[row.data_ptr()]
            expert = balancer.placement.physical_to_logical[place]
            count = int(balancer.placement.replica_count[place[0], expert])
            if (count > 1) == replicated:
                flipped.append(row)
                row[0] ^= 1
        fill_first(self)

    with mock.patch.object(Transfer, "fill_first", flip if damage.here else fill_first):
        report = damage.until(lambda report: report.mismatches > 0)
    if replicated:
        assert report.mismatches == 1
        assert report.reason == ""
    else:
        assert "have no sound replica" in report.reason
        assert damage.wrong() == 1
        report = damage.until(lambda report: report.mismatches > 0)
        assert damage.wrong() == 1
        for row in flipped:
            row[0] ^= 1
    return damage.over()


def in_a_slot(damage: Damage, replicated: bool, undo: bool) -> float:
    slot = damage.slots(replicated)[0]
    before = damage.service.balancer.placement.physical_to_logical[slot.layer]
    damage.flip(slot)
    assert damage.wrong() == 1
    report = damage.until(lambda report: report.mismatches > 0)
    assert report.mismatches == 1
    if undo:
        assert "have no sound replica" in report.reason
        assert damage.wrong() == 1
        assert torch.equal(damage.service.balancer.placement.physical_to_logical[slot.layer], before)
        damage.flip(slot)
    return damage.over()


def scales_exchanged(damage: Damage) -> float:
    slots = damage.slots(True)
    one, other = next((a, b) for a in slots for b in slots if a.layer == b.layer and a.index < b.index)
    damage.exchange(one, other)
    assert damage.wrong() == 2
    report = damage.until(lambda report: report.mismatches > 0)
    assert report.mismatches == 2
    return damage.over()


def damage_in_turn(seat: Seat, mode: str, verify: str, victim: int) -> dict[str, float]:
    """Seconds from each kind of damage until all slots were right."""
    service = Service(seat, CONFIG, mode=mode, verify=verify)
    damage = Damage(service, victim)
    service.serve(2)
    seconds = on_the_way(damage)
    seconds["bit flipped in a source, another replica"] = where_it_is_sent_from(damage, True)
    seconds["bit flipped in a source, no other replica (the layer stays)"] = where_it_is_sent_from(
        damage, False
    )
    seconds["bit flipped in a slot, another replica"] = in_a_slot(damage, True, undo=False)
    seconds["bit flipped in a slot, no other replica (the layer stays)"] = in_a_slot(damage, False, undo=True)
    seconds["scales of two slots exchanged"] = scales_exchanged(damage)
    assert not seat.logged
    return seconds


@pytest.mark.parametrize("verify", ["sampled", "all"])
@pytest.mark.parametrize(("mode", "victim"), [("sync", 0), ("async", 1)])
def test_damaged_bytes_are_replaced_and_never_spread(
    mode: str, victim: int, verify: str, record: Record
) -> None:
    ranks = run_cluster(damage_in_turn, SIZE, mode, verify, victim)
    for fault in ranks[0]:
        record(
            fault,
            mode,
            f"verify={verify}",
            placement=True,
            outputs=True,
            seconds=max(seconds[fault] for seconds in ranks),
            after="on",
        )
