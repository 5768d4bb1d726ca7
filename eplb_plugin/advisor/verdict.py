"""The advice in sentences: worth it or not, and why."""

from __future__ import annotations

from .advice import SAFE_SIMILARITY, Advice

__all__ = ["is_worth_it", "verdict"]

_WORTH = 1.05
_LITTLE = 1.02
_BUSY_LINKS = 0.05


def is_worth_it(advice: Advice) -> bool:
    """Whether the MoE layers gain at least 5% on both halves."""
    return _gain(advice) >= _WORTH


def verdict(advice: Advice, num_experts: int) -> list[str]:
    """Sentences for people, the verdict first."""
    best, test = advice.best, advice.back_test
    gain, redundant = _gain(advice), best.setting.slots - num_experts
    use = (
        f"{redundant} redundant experts, a rebalance every {best.setting.interval} steps and "
        f"move_price {best.setting.move_price:g}"
    )
    if gain >= _WORTH:
        said = [f"Worth it: with {use}, MoE layers run {gain:.2f} times as fast as without balancing."]
    elif gain >= _LITTLE:
        said = [f"Worth little: at best, with {use}, MoE layers run {gain:.2f} times as fast."]
    else:
        said = [f"Not worth it: even with {use}, MoE layers run only {gain:.2f} times as fast."]
    if gain < _WORTH:
        said.append(_why_not(advice))
    if best.cost.transfer_share > _BUSY_LINKS:
        said.append(
            f"Transfers keep the busiest links busy {best.cost.transfer_share:.0%} of the time. If the "
            "network has other work, choose a longer interval or a higher move_price."
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


def _gain(advice: Advice) -> float:
    """The net speed-up of the worse half."""
    best, test = advice.best, advice.back_test
    return min(best.net, test.measured / test.static * max(0.0, 1 - best.cost.transfer_share))


def _why_not(advice: Advice) -> str:
    if advice.static > 1 / _WORTH:
        return f"The load is even as it is: balancedness {advice.static:.3f} without balancing."
    if advice.best.speedup >= _WORTH > advice.best.net:
        return "Transfers cost more than balancing gains: the links are too slow for these experts."
    if not advice.back_test.same_traffic:
        return "The traffic changes faster than placements can follow it."
    return "Hot experts change from step to step, or there are too few slots to spread them."
