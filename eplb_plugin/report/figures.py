"""The pictures of the report: their style, and one function each, from a replay to a matplotlib figure."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.errors import EplbError
from ..core.placement import Placement
from .replay import PolicyReplay, Replay

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "balancedness_over_time",
    "dispatches_compared",
    "hottest_experts",
    "moves_over_time",
    "picture",
    "policies_compared",
    "rank_load_maps",
]

_HOTTEST = 10  # experts in their picture
_WIDTH = 4.8  # inches; narrow, so that text is readable on a page of 400 pixels

_MUTED = "#6b6b6b"

# Okabe and Ito's palette, its strongest colour for the default policy.
_COLOURS = {"static": "#999999", "greedy": "#E69F00", "adaptive": "#0072B2"}
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


def _colour(policy: str, index: int) -> str:
    """The colour of a policy; `index` chooses among those without a policy of their own."""
    return _COLOURS.get(policy, _OTHERS[index % len(_OTHERS)])


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


def rank_load_maps(replay: Replay, policy: PolicyReplay) -> Figure:
    """Load of each rank and layer, before and after, on one colour scale."""
    before = replay.mean_rank_loads(_static(replay)).numpy()
    after = replay.mean_rank_loads(policy).numpy()
    layers, ranks = before.shape
    top = float(np.nanmax([before, after]))
    with picture(3.9) as drawn:
        axes = drawn.subplots(1, 2, sharey=True)
        names = ("before: not rebalanced", f"after: {policy.result.policy}")
        for axis, values, name in zip(axes, (before, after), names, strict=True):
            scale: Any = {"aspect": "auto", "cmap": "cividis", "vmin": 0, "vmax": top}
            image = axis.imshow(values, interpolation="nearest", **scale)
            axis.set_title(f"{name}\nfullest rank: {np.nanmax(values):.2f} x mean", fontsize=9)
            axis.set(xlabel="rank", xticks=_some(ranks))
            axis.spines[:].set_visible(False)
            axis.tick_params(length=0)
        axes[0].set_ylabel("layer")
        shown = _some(layers)
        axes[0].set_yticks(shown, [str(replay.trace.layer_ids[index]) for index in shown])
        bar = drawn.colorbar(image, ax=axes, location="top", fraction=0.05, pad=0.03, aspect=40)
        bar.set_label("load of the rank / mean of its layer")
        bar.outline.set_visible(False)
    return drawn


def balancedness_over_time(replay: Replay) -> Figure:
    """Balancedness of each interval, measured and predicted, for each policy."""
    with picture(3.4) as drawn:
        axis = drawn.subplots()
        for index, policy in enumerate(replay.policies):
            parts = policy.result.intervals
            edges = [part.first_step for part in parts] + [parts[-1].first_step + parts[-1].steps]
            name, tint = policy.result.policy, _colour(policy.result.policy, index)
            values = [part.balancedness for part in parts]
            axis.stairs(values, edges, color=tint, linewidth=2, baseline=None, label=name)
            if name != "static":
                middles = [part.first_step + part.steps / 2 for part in parts]
                circle: Any = {"markersize": 4, "markerfacecolor": "white", "markeredgecolor": tint}
                axis.plot(middles, policy.predicted, "o", **circle, label=f"{name}, predicted")
        axis.axvspan(0, replay.interval, color="#f0f0f0", linewidth=0)
        upright: Any = {"rotation": 90, "ha": "center", "va": "bottom", "fontsize": 8, "color": _MUTED}
        axis.text(replay.interval / 2, 0.02, "recording", transform=axis.get_xaxis_transform(), **upright)
        axis.set(xlim=(0, replay.trace.num_steps), ylim=(None, 1))
        axis.set(xlabel=replay.unit, ylabel="balancedness (1 is perfect)")
        axis.grid(axis="y")
        _legend_above(axis)
    return drawn


def moves_over_time(replay: Replay) -> Figure:
    """Moves of each rebalance as a share of all slots, for each policy."""
    cells = replay.trace.num_layers * replay.topology.num_slots
    with picture(2.9) as drawn:
        axis = drawn.subplots()
        for index, policy in enumerate(replay.policies):
            name, parts = policy.result.policy, policy.result.intervals
            if name != "static":
                steps = [part.first_step for part in parts]
                shares = [100 * part.moves / cells for part in parts]
                tint = _colour(name, index)
                axis.plot(steps, shares, "o-", color=tint, markersize=4, linewidth=1.5, label=name)
        axis.set(xlim=(0, replay.trace.num_steps), ylim=(0, None))
        axis.set(xlabel=f"{replay.unit} of the rebalance", ylabel="experts moved (% of all slots)")
        axis.grid(axis="y")
        _legend_above(axis)
    return drawn


def hottest_experts(replay: Replay, policy: PolicyReplay) -> Figure:
    """The experts with the highest load relative to their layer, and the load of each of their replicas."""
    last = policy.result.intervals[-1]
    load = replay.trace.load[last.first_step :].double().mean(0)
    share = (load / load.mean(1, keepdim=True)).nan_to_num(0)
    top = share.flatten().topk(min(_HOTTEST, share.numel())).indices
    count = policy.placements[-1].replica_count
    rows = [divmod(int(item), share.shape[1]) for item in top]
    total = np.array([float(share[layer, expert]) for layer, expert in rows])
    replicas = np.array([int(count[layer, expert]) for layer, expert in rows])
    with picture(3.9) as drawn:
        axis = drawn.subplots()
        place = np.arange(len(rows))
        axis.barh(place, total, color="#cfcfcf", height=0.72, label="all its tokens")
        tint = _COLOURS["adaptive"]
        axis.barh(place, total / replicas, color=tint, height=0.36, label="each replica's part")
        for index, number in enumerate(replicas):
            label = "1 replica" if number == 1 else f"{number} replicas"
            axis.text(total[index] + 0.015 * total[0], index, label, va="center", fontsize=8.5, color=_MUTED)
        names = [f"layer {replay.trace.layer_ids[layer]}, expert {expert}" for layer, expert in rows]
        axis.set_yticks(place, names)
        axis.invert_yaxis()
        axis.set(xlim=(0, total[0] * 1.22), xlabel="tokens, 1 = a mean expert of that layer")
        axis.tick_params(axis="y", length=0)
        axis.grid(axis="x")
        _legend_above(axis)
    return drawn


def policies_compared(replay: Replay) -> Figure:
    """Balancedness and moves of each policy."""
    names = [item.result.policy for item in replay.policies]
    tints = [_colour(name, index) for index, name in enumerate(names)]
    balance = [item.result.balancedness for item in replay.policies]
    moved = [100 * item.result.moved_share for item in replay.policies]
    with picture(0.9 + 0.42 * len(names)) as drawn:
        left, right = drawn.subplots(1, 2, sharey=True)
        panels = (
            (left, balance, "balancedness (1 is perfect)", "{:.3f}", 1.0),
            (right, moved, "slots moved per rebalance (%)", "{:.1f}", max(*moved, 1.0)),
        )
        for axis, values, title, form, end in panels:
            bars = axis.barh(names, values, color=tints, height=0.62)
            axis.bar_label(bars, [form.format(value) for value in values], padding=3, fontsize=8.5)
            axis.set_title(title, fontsize=9)
            axis.set(xlim=(0, end * 1.25), xticks=[])
            axis.spines[["bottom", "left"]].set_visible(False)
            axis.tick_params(length=0)
        left.invert_yaxis()
    return drawn


def dispatches_compared(replay: Replay) -> Figure:
    """Time of the experts at the slowest rank under each policy, with the even split and with `balanced`.

    The replay holds both dispatches.
    """
    names = [item.result.policy for item in replay.policies]
    tints = [_colour(name, index) for index, name in enumerate(names)]
    times = {
        dispatch: [
            next(item.cost for item in policy.result.dispatches if item.dispatch == dispatch)
            for policy in replay.policies
        ]
        for dispatch in ("even", "balanced")
    }
    place = np.arange(len(names))
    with picture(1.1 + 0.62 * len(names)) as drawn:
        axis = drawn.subplots()
        # A light tint over white, so that the grid does not show through.
        for dispatch, offset, alpha in (("even", -0.19, 0.4), ("balanced", 0.19, 1.0)):
            axis.barh(place + offset, times[dispatch], height=0.34, color="white")
            bars = axis.barh(place + offset, times[dispatch], height=0.34, color=tints, alpha=alpha)
            axis.bar_label(
                bars, [f"{dispatch} {time:.3f}" for time in times[dispatch]], padding=3, fontsize=8.5
            )
        axis.axvline(1, color=_MUTED, linewidth=1, linestyle=(0, (3, 3)))
        axis.set_yticks(place, names)
        axis.invert_yaxis()
        axis.set(
            xlim=(0, max(times["even"]) * 1.36), xlabel="time of the slowest rank, 1 = mean load of a rank"
        )
        axis.tick_params(axis="y", length=0)
        axis.grid(axis="x")
    return drawn


def _static(replay: Replay) -> PolicyReplay:
    """The default placement of engines, as if the policy `static` had been replayed."""
    trace = replay.trace
    default = Placement.default(trace.num_layers, trace.num_experts, replay.topology.num_slots)
    some = replay.policies[0]
    return PolicyReplay(some.result, (default,) * len(some.placements), some.predicted)


def _some(count: int) -> list[int]:
    """About eight indices at most, evenly spaced by a round number."""
    step = next(size for size in (1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100, count) if count / size <= 8)
    return list(range(0, count, step))


def _legend_above(axis: Axes) -> None:
    """A legend, if any policy has something to show there: `static` alone has no moves."""
    if axis.get_legend_handles_labels()[0]:
        axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2, handlelength=1.6)
