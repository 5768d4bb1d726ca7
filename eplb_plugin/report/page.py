"""The report as one HTML file without scripts or external resources."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.safe_files import written_whole
from . import figures
from .replay import PolicyReplay, Replay

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Picture", "picture_set", "write_page"]

_DPI = 220
_STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; padding: 16px; max-width: 1180px; background: #fff; color: #1b1b1b;
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: .4em 0; } h2 { font-size: 1.25rem; margin: 2em 0 .3em;
  border-top: 1px solid #ddd; padding-top: 1em; } h3 { font-size: 1.02rem; margin: 0 0 .2em; }
p { margin: .3em 0; } .quiet { color: #555; font-size: .92rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr));
  gap: 28px 36px; align-items: start; margin-top: 1.2em; }
figure { margin: 0; } img { width: 100%; max-width: 560px; height: auto; display: block; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .8em 0; font-size: .92rem; overflow-wrap: normal; }
th, td { padding: 4px 0 4px 9px; text-align: right; font-variant-numeric: tabular-nums; }
td { white-space: nowrap; } th:first-child, td:first-child { padding-left: 0; }
th { border-bottom: 1px solid #999; font-weight: 600; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
"""


@dataclass(frozen=True)
class Picture:
    """A picture with its caption.

    Attributes:
        key: name for files.
        title: heading.
        note: caption of one or two sentences.
        png: the image.
    """

    key: str
    title: str
    note: str
    png: bytes


def picture_set(replay: Replay) -> Iterator[Picture]:
    """Draw the pictures of a replay, one by one; each takes up to a second.

    Raises:
        EplbError: matplotlib is not installed.
    """
    chosen = chosen_policy(replay)
    yield Picture(
        "policies",
        "Policies side by side",
        "Balancedness is measured on the steps after each plan. A move is a transfer of one expert's weights "
        "to another rank.",
        _png(figures.policies_compared(replay)),
    )
    yield Picture(
        "rank_loads",
        "Load of each rank",
        "Each cell is one rank in one layer, over all steps. A layer waits for its fullest rank: an even "
        "colour is good, bright cells cost time.",
        _png(figures.rank_load_maps(replay, chosen)),
    )
    yield Picture(
        "balancedness",
        "Balancedness over time",
        "Lines: measured in each interval. Circles: predicted, for the same placement on the interval before "
        "it, from which it was planned. A circle far above its line is a change of traffic.",
        _png(figures.balancedness_over_time(replay)),
    )
    if chosen.balanced is not None:
        cost = f" An expert in use costs {replay.expert_cost} tokens at least." if replay.expert_cost else ""
        yield Picture(
            "dispatch",
            "What dispatch adds",
            "Light: the tokens of an expert go to its replicas evenly. Dark: dispatch balanced splits each "
            f"batch so that all ranks finish together. Dashed: all tokens spread over all ranks.{cost}",
            _png(figures.dispatches_compared(replay)),
        )
    yield Picture(
        "moves",
        "Moves over time",
        "Transfers of each rebalance. The first rebalance leaves the engine's default placement.",
        _png(figures.moves_over_time(replay)),
    )
    yield Picture(
        "hottest_experts",
        "The hottest experts and their replicas",
        f"In the last interval, under {chosen.result.policy}. Grey: tokens of the expert. Blue: tokens of "
        "each of its replicas.",
        _png(figures.hottest_experts(replay, chosen)),
    )


def chosen_policy(replay: Replay) -> PolicyReplay:
    """The policy for pictures of one placement: the default one, otherwise the last one."""
    return next((item for item in replay.policies if item.result.policy == "adaptive"), replay.policies[-1])


def write_page(path: str | Path, sections: list[tuple[Replay, list[Picture]]]) -> None:
    """Write the report.

    Raises:
        TraceError: the file cannot be written.
    """
    body = "".join(_section(replay, pictures) for replay, pictures in sections)
    text = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<title>Expert load report</title>\n<style>{_STYLE}</style>\n'
        "</head>\n<body>\n<h1>Expert load report</h1>\n"
        "<p>Offline replay of recorded loads: each policy plans from past steps and is scored on the steps "
        "after them. <b>Balancedness</b> is the mean rank load over the maximum rank load, both summed over "
        "layers: at 0.5 the ranks wait half of the time, at 1 no rank waits.</p>\n"
        f"{body}</body>\n</html>\n"
    )
    with written_whole(path) as part:
        part.write_text(text, encoding="utf-8")


def _section(replay: Replay, pictures: list[Picture]) -> str:
    trace, topology = replay.trace, replay.topology
    nodes = f" on {topology.num_nodes} nodes" if topology.num_nodes > 1 else ""
    shown = "".join(
        f"<figure><h3>{escape(item.title)}</h3>"
        f'<img alt="{escape(item.title)}" src="data:image/png;base64,{base64.b64encode(item.png).decode()}">'
        f'<figcaption class="quiet">{escape(item.note)}</figcaption></figure>\n'
        for item in pictures
    )
    left_out = "".join(f'<p class="quiet">{escape(line)}.</p>\n' for line in replay.left_out)
    return (
        f"<h2>{escape(trace.name)}</h2>\n"
        f'<p class="quiet">{trace.length}, {trace.num_layers} layers, {trace.num_experts} experts '
        f"in {topology.num_slots} slots on {topology.num_ranks} ranks{nodes}; rebalanced every "
        f"{replay.interval} steps.</p>\n{left_out}"
        f'<div class="grid">\n<div>{_numbers(replay)}</div>\n{shown}</div>\n'
    )


def _numbers(replay: Replay) -> str:
    """The headline and the table."""
    chosen = chosen_policy(replay)
    best = chosen.result
    static = next((item for item in replay.policies if item.result.policy == "static"), None)
    told = f"<p><b>{escape(best.policy)}</b> reaches a balancedness of <b>{best.balancedness:.3f}</b>"
    if static is not None and static is not chosen:
        change = chosen.time(replay.expert_cost) / static.time(replay.expert_cost) - 1
        told += (
            f", against {static.result.balancedness:.3f} when nothing is ever rebalanced. Where MoE layers "
            f"wait for their fullest rank, they take {abs(change):.0%} "
            f"{'less' if change <= 0 else 'more'} time"
        )
    told += f". A rebalance moves {best.moved_share:.1%} of the slots.</p>{_dispatch_told(replay)}"
    rows = "".join(
        f"<tr><td>{escape(item.result.policy)}</td><td>{item.result.balancedness:.4f}</td>"
        f"<td>{min(part.balancedness for part in item.result.intervals):.4f}</td>"
        f"<td>{item.result.moved_share:.1%}</td><td>{item.result.plan_ms:.0f}</td>"
        f"<td>{'-' if item.balanced is None else f'{1 - item.balanced.cost_ratio:.1%}'}</td></tr>"
        for item in replay.policies
    )
    return (
        f'<h3>In numbers</h3>{told}<div class="scroll"><table><tr><th>policy</th><th>balanced&shy;ness</th>'
        "<th>worst interval</th><th>slots moved</th><th>plan ms</th><th>dispatch saves</th></tr>"
        f"{rows}</table></div>"
    )


def _dispatch_told(replay: Replay) -> str:
    """What dispatch `balanced` adds to the chosen policy, and when that is worth its message."""
    chosen = chosen_policy(replay)
    if chosen.balanced is None:
        return "<p>Dispatch is not judged: the load has fractions of tokens, so its steps are no batches.</p>"
    saved = 1 - chosen.balanced.cost_ratio
    told = "With dispatch <b>balanced</b>, which splits each step as one batch, "
    if not replay.expert_cost:
        told += f"balancedness is {chosen.balanced.balancedness:.3f}, and "
    told += f"the experts take {saved:.1%} less time than with the even split"
    if replay.expert_cost:
        told += f", at an expert cost of {replay.expert_cost} tokens"
    if not replay.message_us:
        told += ". It needs no message: every rank has all tokens."
    elif saved > 0:
        told += (
            f". Its message, assumed to take {replay.message_us:g} &micro;s for each layer and batch, pays "
            f"where the experts of a layer take above {replay.message_us / saved:.0f} &micro;s."
        )
    else:
        told += ", which is not worth a message."
    return f"<p>{told}</p>"


def _png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    # Without the version of matplotlib, the same load gives the same bytes.
    figure.savefig(stream, format="png", dpi=_DPI, metadata={"Software": None})
    return stream.getvalue()
