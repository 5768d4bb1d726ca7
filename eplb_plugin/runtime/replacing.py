"""Weights that the engine has loaded anew, taken in by all ranks together."""

from __future__ import annotations

from dataclasses import replace

from ..core.errors import TransferError
from ..core.placement import Placement
from .context import Parts
from .control.rank_group import fingerprint
from .verify.fingerprints import ExpertFingerprints
from .weights.expert_weights import ExpertWeights

__all__ = ["with_weights_again"]


def with_weights_again(parts: Parts, placement: Placement) -> Parts:
    """All ranks: the same parts with the weights registered again and fingerprinted as they are now.

    Args:
        parts: their weights are given up.
        placement: the one in force.

    Raises:
        TransferError: a tensor has a layout that cannot be moved. AgreementError: ranks differ in the
        structure. RankLostError: another rank does not answer.
    """
    control = parts.channels.control

    def register() -> ExpertWeights:
        parts.weights.release()
        return parts.weights.again()

    weights = control.attempt("registering weights again", register, TransferError)
    control.agree("the structure of the expert weights", fingerprint(weights.signature))
    prints = parts.fingerprints
    if prints is not None:
        prints = ExpertFingerprints.make(weights, placement, parts.topology, control, prints.coverage)
    weights.claim()
    return replace(parts, weights=weights, fingerprints=prints)
