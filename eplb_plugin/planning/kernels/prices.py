"""What the moves of a layer cost: each costs more than the one before it.

A layer whose traffic is steady finds few exchanges that are worth anything, and may make all of them; one
whose traffic keeps changing always finds more, whose gain the next change undoes. A price that rises lets the
first spend and the second save, without knowing which is which.
"""

from __future__ import annotations

from .compiling import _compile

_DOUBLED_AT = 1.0 / 16.0  # share of the slots of a layer


@_compile
def _price_of_next(price, moves, num_slots):
    """The price of one more move after `moves`: twice the first one's after a sixteenth of the slots, five
    times after an eighth, seventeen times after a quarter."""
    share = max(moves, 0) / (num_slots * _DOUBLED_AT)
    return price * (1.0 + share * share)


@_compile
def _price_of_all(price, moves, num_slots):
    """What `moves` cost together."""
    share = max(moves, 0) / (num_slots * _DOUBLED_AT)
    return price * moves * (1.0 + share * share / 3.0)
