"""Condensing a window: nothing is lost, and the newest snapshots stay as they are."""

from __future__ import annotations

import pytest
import torch

from eplb_plugin.planning.recency import condense


@pytest.mark.parametrize("snapshots", [1, 2, 15, 16, 17, 20, 31, 33, 64, 100])
def test_the_sum_is_kept_and_time_order_too(snapshots):
    load = torch.arange(snapshots, dtype=torch.float64)[:, None, None].expand(-1, 2, 3)
    condensed = condense(load, 1.0)
    assert condensed.sum() == load.sum()
    fine = min(snapshots, 16)
    assert torch.equal(condensed[-fine:], load[-fine:])
    # Each condensed snapshot is a run of the old ones, and the runs follow each other.
    ends = condensed[:, 0, 0].cumsum(0)
    assert set(ends.tolist()) <= set(load[:, 0, 0].cumsum(0).tolist())
    assert condensed.shape[0] <= fine + 4 + max(0, -(-(snapshots - 32) // 8))


def test_snapshots_weigh_less_the_older_they_are():
    condensed = condense(torch.ones(3, 1, 1, dtype=torch.float64), 0.5)
    assert condensed.flatten().tolist() == [0.25, 0.5, 1.0]
