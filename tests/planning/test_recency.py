"""Condensing a window: nothing is lost, and the old are seen less finely than the new."""

from __future__ import annotations

import pytest
import torch

from eplb_plugin.planning.recency import condense


@pytest.mark.parametrize("decay", [1.0, 0.95, 0.5])
@pytest.mark.parametrize("snapshots", [1, 2, 31, 32, 33, 40, 63, 65, 128, 200])
def test_the_weighted_sum_is_kept_and_time_order_too(snapshots, decay):
    load = torch.arange(1, snapshots + 1, dtype=torch.float64)[:, None, None].expand(-1, 2, 3)
    condensed = condense(load, decay)
    weighted = load * torch.tensor([decay**age for age in reversed(range(snapshots))])[:, None, None]
    torch.testing.assert_close(condensed.sum(0), weighted.sum(0))
    assert 1 <= condensed.shape[0] <= min(32, snapshots)
    # Each condensed snapshot is a run of the old ones, and the runs follow each other.
    ends = condensed[:, 0, 0].cumsum(0)
    sums = weighted[:, 0, 0].cumsum(0)
    assert all(bool(torch.isclose(sums, end).any()) for end in ends)
    # None weighs more than two shares of the whole.
    share = sum(decay**age for age in range(snapshots)) / min(32, snapshots)
    ones = condense(torch.ones(snapshots, 1, 1, dtype=torch.float64), decay).flatten()
    assert ones.max() <= max(1.0, 2 * share)


def test_a_window_without_decay_is_cut_evenly():
    assert condense(torch.ones(128, 1, 1, dtype=torch.float64), 1.0).flatten().tolist() == [4.0] * 32
    short = torch.rand(32, 2, 3, dtype=torch.float64)
    assert torch.equal(condense(short, 1.0), short)


def test_snapshots_weigh_less_the_older_they_are():
    condensed = condense(torch.ones(3, 1, 1, dtype=torch.float64), 0.5)
    assert condensed.flatten().tolist() == [0.25, 0.5, 1.0]
