"""One look for all pictures: colours that colour-blind readers tell apart, sizes that a phone shows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..core.errors import EplbError

__all__ = ["MUTED", "WIDTH", "colour", "pictures"]

WIDTH = 4.8
"""Width of every picture in inches: narrow, so that its text stays readable where the page is 400 pixels."""

MUTED = "#6b6b6b"

# Okabe and Ito's palette; what the package does is the strongest of them.
_NAMED = {"static": "#999999", "greedy": "#E69F00", "adaptive": "#0072B2"}
_OTHERS = ("#009E73", "#CC79A7", "#D55E00", "#56B4E9")
_RC: Any = {
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.labelsize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#444444",
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.facecolor": "white",
    "svg.hashsalt": "eplb-plugin",
}


def colour(policy: str, index: int) -> str:
    """The colour of a policy; `index` chooses one for those that have none of their own."""
    return _NAMED.get(policy, _OTHERS[index % len(_OTHERS)])


@contextmanager
def pictures() -> Iterator[Any]:
    """matplotlib's `figure` module in the package's style, without any window system.

    Raises:
        EplbError: matplotlib is not installed; says how to install it.
    """
    try:
        import matplotlib as mpl
        from matplotlib import figure
    except ImportError:
        raise EplbError(
            "pictures need matplotlib, which is not installed: pip install 'eplb-plugin[report]'"
        ) from None
    with mpl.rc_context(_RC):
        yield figure
