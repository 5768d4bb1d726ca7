"""Style of all pictures: colours for colour-blind readers, text sizes for a phone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..core.errors import EplbError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["MUTED", "colour", "picture"]

_WIDTH = 4.8  # inches; narrow, so that text is readable on a page of 400 pixels

MUTED = "#6b6b6b"

# Okabe and Ito's palette, its strongest colour for the default policy.
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
    """The colour of a policy; `index` chooses among those without a policy of their own."""
    return _NAMED.get(policy, _OTHERS[index % len(_OTHERS)])


@contextmanager
def picture(height: float) -> Iterator[Figure]:
    """An empty figure of `height` inches in the package's style, without any window system.

    Raises:
        EplbError: matplotlib is not installed; the message says how to install it.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        raise EplbError(
            "pictures need matplotlib, which is not installed: pip install 'eplb-plugin[report]'"
        ) from None
    with mpl.rc_context(_RC):
        yield Figure(figsize=(_WIDTH, height), layout="constrained")
