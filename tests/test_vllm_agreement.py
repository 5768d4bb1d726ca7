"""Ranks that were started differently say so at once, and no rank waits for one that is not there."""

from __future__ import annotations

from datetime import timedelta

import pytest

from eplb_plugin import AgreementError
from eplb_plugin.integration.common import agreement
from tests.processes import run_ranks


def _start(rank: int, options: tuple[str | None, ...], limit: float, ranks: tuple[int, ...]) -> str:
    """What this rank says; None: the plugin is not installed there."""
    agreement._LIMIT = timedelta(seconds=limit)
    mine = options[rank]
    if mine is None:
        return ""
    compare = agreement.announce(mine)
    if not mine or rank not in ranks:
        return ""
    try:
        compare(ranks)
    except AgreementError as error:
        return str(error)
    return "agreed"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("a", "a", "a"), ["agreed", "agreed", "agreed"]),
        (("a", "", "a"), ["rank 0, but not on ranks [1]", "", "rank 2, but not on ranks [1]"]),
        (("a", "a", "b"), ["ranks [2] than on rank 0: b on rank 2, here a", "[2]", "[0, 1] than on rank 2"]),
    ],
)
def test_all_ranks_hear_of_the_same_difference(options, said):
    heard = run_ranks(_start, 3, options, 60.0, (0, 1, 2))
    assert all(part in text and bool(part) == bool(text) for part, text in zip(said, heard, strict=True))


def test_a_rank_without_the_plugin_is_named_after_a_while():
    heard = run_ranks(_start, 3, ("a", None, "a"), 1.0, (0, 1, 2))
    assert "ranks [1] have not said within 1 s" in heard[0]
    assert "installed on every node" in heard[2]


def test_other_groups_are_not_asked():
    assert run_ranks(_start, 3, ("a", "a", "b"), 60.0, (0, 1)) == ["agreed", "agreed", ""]
    assert run_ranks(_start, 2, ("a", "b"), 60.0, (0, 1, 2, 3)) == ["agreed", "agreed"], "elastic"


def test_without_a_group_there_is_nobody_to_ask():
    agreement.announce("a")([0])
