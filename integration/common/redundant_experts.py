"""Numbers of experts and ranks that do not fit, told in the engine's own option."""

from __future__ import annotations

__all__ = ["uneven_slots"]


def uneven_slots(experts: int, redundant: int, ranks: int, option: str) -> str | None:
    """What is wrong where the slots do not spread evenly over the ranks; None where they do.

    Example: 256 experts, 0 redundant ones and 3 ranks with `option` num_redundant_experts end in
    "num_redundant_experts=2 would be".

    Args:
        experts: logical experts per layer.
        redundant: slots beyond them.
        ranks: of the expert-parallel group.
        option: of the engine, for the number of redundant experts.
    """
    slots = experts + redundant
    if slots % ranks == 0:
        return None
    above = -(-slots // ranks) * ranks - experts
    below = above - ranks
    right = f"{option}={above}" if below < 0 else f"{option}={below} or {above}"
    return (
        f"{option}={redundant}: {experts} experts and {redundant} redundant ones are {slots} slots, not "
        f"divisible by {ranks} ranks; {right} would be"
    )
