"""vLLM's ring of recorded steps, kept free of those that do not belong to the map in force."""

from __future__ import annotations

import functools
from typing import Any

__all__ = ["RingKeeper"]


class RingKeeper:
    """Clears the rings of an `EplbState` when a rearrangement is over. Only this object is changed.

    vLLM itself never clears a ring. A rank without work writes nothing to its own, so that its steps of
    earlier intervals would count again, for whatever experts their slots hold by now; and while weights are
    moved asynchronously, layer by layer, steps are recorded partly under one map and partly under the next.

    Args:
        state: an `EplbState`; its `step` is wrapped.
    """

    def __init__(self, state: Any) -> None:
        self._state = state
        self._stale = False
        step = state.step

        @functools.wraps(step)
        def stepping(*args: Any, **kwargs: Any) -> Any:
            result = step(*args, **kwargs)
            self.clear()
            return result

        state.step = stepping

    def rearranged(self) -> None:
        """A rearrangement has begun: what is recorded until it is over will be cleared."""
        self._stale = True

    def clear(self) -> None:
        """Clear the rings, if a rearrangement is over since they were cleared last. Device work only."""
        models = list(self._state.model_states.values())
        if not self._stale or any(model.rebalanced for model in models):
            return
        self._stale = False
        for model in models:
            model.expert_load_window.zero_()
