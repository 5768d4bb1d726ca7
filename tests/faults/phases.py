"""Phases of a rebalance, and hooks that act where this process enters one: the code itself knows of none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from eplb_plugin.runtime import rebalance, relocation
from eplb_plugin.runtime.control.two_phase_commit import DecisionStore

__all__ = ["PHASES", "Hook", "at_phases", "once"]

Hook = Callable[[str], None]

# What a phase begins with: owner and name of a function.
_ENTRANCES: dict[str, tuple[Any, str]] = {
    "gather": (rebalance, "gather"),
    "plan": (rebalance, "plan_layers"),
    "agree": (rebalance, "agree_on_plan"),
    "verify": (rebalance, "audit"),
    "stage": (relocation, "reserve"),
    # The commit begins with the question whether the store answers: before the proposal of a step.
    "commit": (DecisionStore, "answers"),
    "report": (rebalance, "write_report"),
}
# And "decided": the decision is known here, and not carried out yet.
PHASES = ("gather", "plan", "agree", "verify", "stage", "commit", "decided", "report")


@contextmanager
def at_phases(hook: Hook) -> Iterator[None]:
    """Call `hook` with every phase that this process enters."""
    with ExitStack() as stack:
        for phase, (owner, name) in _ENTRANCES.items():
            entered = _before(hook, phase, getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, entered))
        decide = DecisionStore.decide

        def decided(self: DecisionStore, key: str, proposal: str) -> str:
            decision = decide(self, key, proposal)
            if key.startswith("migration batch"):
                hook("decided")
            return decision

        stack.enter_context(mock.patch.object(DecisionStore, "decide", decided))
        yield


def once(phase: str, action: Callable[[], None]) -> Hook:
    """A hook that acts when `phase` is first entered."""
    waiting = [action]

    def hook(entered: str) -> None:
        if entered == phase and waiting:
            waiting.pop()()

    return hook


def _before(hook: Hook, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def entered(*args: Any, **kwargs: Any) -> Any:
        hook(phase)
        return function(*args, **kwargs)

    return entered
