"""vLLM's rings are cleared when a rearrangement is over, so that no step counts twice or for another map."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from eplb_plugin.integration.vllm.seams import wrap_step
from eplb_plugin.integration.vllm.window import RingKeeper, fold_window

RING, SLOTS, EXPERTS, INTERVAL = 4, 6, 5, 4


class State:
    """The part of vLLM's `EplbState` that matters: a rank records its steps, unless it has no work."""

    def __init__(self, rebalances_for: int) -> None:
        self.model = SimpleNamespace(
            expert_load_window=torch.zeros(RING, 1, SLOTS, dtype=torch.int32), rebalanced=False
        )
        self.model_states = {"model": self.model}
        self.map = torch.tensor([[0, 1, 2, 3, 4, 0]])
        self.expert_load_window_step = 0
        self.steps, self.left, self.rebalances_for = 0, 0, rebalances_for
        self.folded: list[torch.Tensor] = []
        self.keeper = RingKeeper(self)
        wrap_step(self, self.keeper, None)

    def step(self, is_dummy: bool, is_profile: bool = False, expert: int = 0) -> None:
        if not is_dummy:
            row = self.model.expert_load_window[self.expert_load_window_step]
            row.copy_((self.map == expert).int().cumsum(1).eq(1) & (self.map == expert))
            self.expert_load_window_step = (self.expert_load_window_step + 1) % RING
        self.steps += 1
        if self.left:
            self.left -= 1
            self.model.rebalanced = self.left > 0
            if not self.left:
                self.map = self.map.roll(1, 1)
        if self.steps % INTERVAL == 0:
            self.rearrange()

    def rearrange(self) -> None:
        self.keeper.clear()
        arguments = {"position": self.expert_load_window_step, "steps": INTERVAL, "snapshots": 1}
        self.folded.append(fold_window(self.model.expert_load_window, self.map, EXPERTS, **arguments)[0, 0])
        if self.rebalances_for:
            self.left, self.model.rebalanced = self.rebalances_for, True
        else:
            self.map = self.map.roll(1, 1)
        self.keeper.rearranged()


def test_an_idle_rank_counts_nothing_again():
    state = State(rebalances_for=0)
    for step in range(INTERVAL):
        state.step(is_dummy=False, expert=step)
    assert state.folded[-1].tolist() == [1, 1, 1, 1, 0]
    for _ in range(INTERVAL):
        state.step(is_dummy=True)
    assert state.folded[-1].tolist() == [0] * EXPERTS
    state.step(is_dummy=False, expert=2)
    for _ in range(INTERVAL - 1):
        state.step(is_dummy=True)
    assert state.folded[-1].tolist() == [0, 0, 1, 0, 0]


@pytest.mark.parametrize(("steps", "counted"), [(1, 3), (3, 1), (4, 0)])
def test_steps_during_a_transfer_are_left_out(steps, counted):
    state = State(rebalances_for=steps)
    for step in range(INTERVAL):
        state.step(is_dummy=False, expert=step)
    for _ in range(INTERVAL):
        state.step(is_dummy=False, expert=3)
    assert state.folded[-1].tolist() == [0, 0, 0, counted, 0]


def test_nothing_is_cleared_before_the_first_rearrangement():
    state = State(rebalances_for=0)
    state.step(is_dummy=False, expert=1)
    state.keeper.clear()
    assert int(state.model.expert_load_window.sum()) == 1
