"""What dispatch `balanced` gains over the even split, and whether that is worth its message."""

from __future__ import annotations

from dataclasses import dataclass

from .trial import Trial

__all__ = ["DispatchGain", "dispatch_gain", "dispatch_verdict"]

_WORTH = 0.01  # minimum part of the time of the MoE layers that is worth another dispatch


@dataclass(frozen=True)
class DispatchGain:
    """Dispatch `balanced` against the even split of the same placements.

    Attributes:
        expert_cost: least cost of a replica in use, in tokens.
        first, second: fraction of the time of the experts saved, on each half of the load.
        layer_seconds: time of the experts of a layer with the even split, at the slowest rank; None: unknown.
        message_seconds: time of its message for each layer and batch; 0: none.
    """

    expert_cost: int
    first: float
    second: float
    layer_seconds: float | None
    message_seconds: float

    @property
    def gain(self) -> float:
        """That of the worse half."""
        return min(self.first, self.second)

    @property
    def break_even_seconds(self) -> float:
        """The time of the experts of a layer from which the message pays. 5 % and 20 us: 400 us."""
        if not self.message_seconds:
            return 0.0
        return self.message_seconds / self.gain if self.gain > 0 else float("inf")

    @property
    def is_worth_it(self) -> bool | None:
        """Whether it gains 1 % at least, and more than the message takes; None: the time is unknown."""
        if self.gain < _WORTH:
            return False
        if not self.message_seconds:
            return True
        return None if self.layer_seconds is None else self.layer_seconds > self.break_even_seconds


def dispatch_gain(
    first: Trial,
    second: Trial,
    *,
    expert_cost: int,
    rank_load: float,
    token_seconds: float | None,
    message_seconds: float,
) -> DispatchGain | None:
    """The gain from the trials of one setting on both halves; None if they judged no dispatch.

    Args:
        rank_load: mean load of a rank in one layer and step, in tokens.
        token_seconds: time of one token in one expert; None: unknown.
        message_seconds: time of the all-gather of counts; 0: none is needed.
    """
    saved = []
    for trial in (first, second):
        if trial.even_cost is None or trial.balanced_cost is None:
            return None
        saved.append(1 - trial.balanced_cost / trial.even_cost)
    assert first.even_cost is not None
    layer = None if token_seconds is None else rank_load * first.even_cost * token_seconds
    return DispatchGain(expert_cost, saved[0], saved[1], layer, message_seconds)


def dispatch_verdict(gain: DispatchGain | None, redundant: int) -> list[str]:
    """Sentences for people, the verdict first.

    Args:
        gain: of the best setting.
        redundant: its redundant experts.
    """
    if gain is None:
        return ["Dispatch is not judged: the load has fractions of tokens, so its steps are no batches."]
    if not redundant:
        return ["Dispatch has no choice: without redundant experts, each token has one rank to go to."]
    saves = (
        f"dispatch balanced saves {gain.first:.1%} and {gain.second:.1%} of the experts' time on the halves"
    )
    if gain.gain < _WORTH:
        return [f"Not worth another dispatch: {saves}."]
    if not gain.message_seconds:
        return [f"Worth it: {saves}, without a message, since every rank has all tokens."]
    message = f"{1e6 * gain.message_seconds:.0f} us for each layer and batch"
    limit = f"{1e6 * gain.break_even_seconds:.0f} us"
    if gain.layer_seconds is None:
        return [
            f"Worth it for long layers: {saves}.",
            f"Its message, {message}, pays where the experts of a layer take above {limit}.",
        ]
    layer = f"{1e6 * gain.layer_seconds:.0f} us"
    word = "Worth" if gain.is_worth_it else "Not worth"
    return [
        f"{word} its message: {saves}.",
        f"The experts of a layer take about {layer}; its message, {message}, pays above {limit}.",
    ]
