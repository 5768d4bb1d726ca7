"""The verdict of an advice, in sentences."""

from __future__ import annotations

from .advice import SAFE_SIMILARITY, WORTH_MEMORY, Advice
from .dispatch import dispatch_verdict

__all__ = ["is_worth_it", "verdict"]

_WORTH = 1.05  # minimum net speed-up that is worth it
_LITTLE = 1.02  # minimum net speed-up that is worth little
_BUSY_LINKS = 0.05  # maximum share of time with transfers that needs no warning


def is_worth_it(advice: Advice) -> bool:
    """Whether the MoE layers gain at least 5% on both halves."""
    return _gain(advice) >= _WORTH


def verdict(advice: Advice, num_experts: int) -> list[str]:
    """Sentences for people, the verdict first."""
    best, test = advice.best, advice.back_test
    gain, redundant = _gain(advice), best.setting.slots - num_experts
    interval, price = advice.engine_interval(best.setting), best.setting.move_price
    use = f"{redundant} redundant experts, a rebalance every {interval} steps and move_price {price:g}"
    word = "Worth it" if gain >= _WORTH else "Worth little" if gain >= _LITTLE else "Not worth it"
    # The figure of the table; the second half shows whether it lasts, and the worse of the two decides.
    again = test.speedup * max(0.0, 1 - best.cost.transfer_share)
    said = [
        f"{word}: with {use}, MoE layers run {best.net:.2f} times as fast as without balancing, and "
        f"{again:.2f} times on the second half of the load."
    ]
    if gain < _WORTH:
        said.append(_why_not(advice))
    if best.cost.transfer_share > _BUSY_LINKS:
        said.append(
            f"Transfers keep the busiest links busy {best.cost.transfer_share:.0%} of the time. If the "
            "network has other work, choose a longer interval or a higher move_price."
        )
    said += dispatch_verdict(advice.dispatch, redundant)
    said += _shares(advice, redundant)
    further = max(advice.rated, key=lambda item: item.dispatched or 0.0)
    if (further.dispatched or 0.0) > (1 + WORTH_MEMORY) * max(best.net, best.dispatched or 0.0):
        left_out = ", its message left out" if advice.message_left_out else ""
        said.append(
            f"With dispatch balanced, {further.setting.slots - num_experts} redundant experts would reach "
            f"{further.dispatched:.2f} times{left_out}."
        )
    # Adding 0 turns -0.0 into 0.0.
    missed = round(100 * (test.measured - test.predicted), 1) + 0.0
    said.append(
        f"Predicted from the first half of the load: balancedness {test.predicted:.3f}; measured on the "
        f"second half: {test.measured:.3f} ({missed:+.1f} points). The loads "
        f"of the halves correlate at {test.similarity:.2f}."
    )
    if test.safe:
        said.append("The prediction held, and the mix of traffic stayed the same.")
    elif not test.same_traffic:
        said.append(
            f"The prediction is unsafe: the mix of traffic changes (a correlation below {SAFE_SIMILARITY}). "
            "Record over a time that shows all of it, and prefer short intervals."
        )
    else:
        said.append(
            "The prediction is unsafe: it missed by more than 2 points although the mix hardly changed."
        )
    return said


def _shares(advice: Advice, redundant: int) -> list[str]:
    """How much of the gain is placement, and how much dispatch."""
    best = advice.best
    if best.dispatched is None or not redundant or not best.net:
        return []
    left_out = ", its message left out" if advice.message_left_out else ""
    said = [
        f"Placement gives {best.net:.2f} times. Dispatch balanced multiplies that by "
        f"{best.dispatched / best.net:.2f}, to {best.dispatched:.2f} times{left_out}."
    ]
    if advice.planned is not None:
        said.append(
            f"With plans made for it, as engines make them, it reaches {advice.planned:.2f} times{left_out}."
        )
    return said


def _gain(advice: Advice) -> float:
    """The net speed-up of the worse half."""
    best, test = advice.best, advice.back_test
    return min(best.net, test.speedup * max(0.0, 1 - best.cost.transfer_share))


def _why_not(advice: Advice) -> str:
    if advice.static > 1 / _WORTH:
        return f"The load is even as it is: balancedness {advice.static:.3f} without balancing."
    if advice.best.speedup >= _WORTH > advice.best.net:
        return "Transfers cost more than balancing gains: the links are too slow for these experts."
    if not advice.back_test.same_traffic:
        return "The traffic changes faster than placements can follow it."
    return "Hot experts change from step to step, or there are too few slots to spread them."
