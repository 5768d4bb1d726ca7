"""The load that is expected next, against sums written out, and what planning for it is worth."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import eplb_plugin as eplb
from eplb_plugin.offline.simulation import simulate
from eplb_plugin.offline.synthetic_traffic import generate
from eplb_plugin.planning import forecast
from eplb_plugin.planning.forecast import expected_load, weighted_bins

RECENCY = forecast._RECENCY


def condense(load, decay):
    """The weighted sum of the snapshots of each bin: [bins, layers, logical]."""
    weights, bins = weighted_bins(load.shape[0], decay)
    weighted = load * torch.tensor(weights, dtype=torch.float64)[:, None, None]
    return load.new_zeros(max(bins) + 1, *load.shape[1:]).index_add_(0, torch.tensor(bins), weighted)


def mean_share(layer, rate):
    """Mean share of each expert over the snapshots that are not empty; `layer` is a list of lists."""
    total, weights = [0.0] * len(layer[0]), 0.0
    for age, snapshot in enumerate(reversed(layer)):
        tokens = sum(snapshot)
        if tokens == 0:
            continue
        weights += rate**age
        for expert, load in enumerate(snapshot):
            total[expert] += rate**age * load / tokens
    return [x / weights if weights else 0.0 for x in total]


def lasting(layer, persistence):
    """How much of the difference between moment and mean is expected to last, its noise taken off."""
    share = [[x / sum(row) for x in row] for row in layer if sum(row)]
    steps = [
        sum((x / sum(b) - y / sum(a)) ** 2 for x, y in zip(b, a, strict=True))
        for a, b in itertools.pairwise(layer)
        if sum(a) and sum(b)
    ]
    if not share or not steps:
        return persistence if share else 0.0
    weights = [RECENCY**age for age, row in enumerate(reversed(layer)) if sum(row)]
    spread = sum(w * w for w in weights) / sum(weights) ** 2 - 1 / len(share)
    change = [m - w for m, w in zip(mean_share(layer, RECENCY), mean_share(layer, 1.0), strict=True)]
    size = sum(x * x for x in change)
    return persistence * max(0.0, 1 - sum(steps) / len(steps) / 2 * spread / size) if size else 0.0


def expected_slowly(load, decay, persistence):
    """[snapshots, layers, logical] as lists, not condensed."""
    result = [[None] * len(load[0]) for _ in load]
    for number in range(len(load[0])):
        layer = [snapshot[number] for snapshot in load]
        whole, moment, aged = (mean_share(layer, rate) for rate in (1.0, RECENCY, decay))
        lasts = lasting(layer, persistence)
        for age, snapshot in enumerate(reversed(layer)):
            moved = []
            for expert, tokens in enumerate(snapshot):
                wanted = whole[expert] + lasts * (moment[expert] - whole[expert])
                moved.append(max(0.0, tokens + (wanted - aged[expert]) * sum(snapshot)))
            result[len(load) - 1 - age][number] = [x * decay**age for x in moved]
    return torch.tensor(result, dtype=torch.float64)


def random_window(snapshots, layers, experts, seed=0):
    generator = torch.Generator().manual_seed(seed)
    load = torch.empty(snapshots, layers, experts, dtype=torch.float64)
    load = load.log_normal_(3, 1.5, generator=generator).round()
    # Some experts without tokens, a layer without any in one snapshot, and one without any at all.
    load[torch.rand(load.shape, generator=generator) < 0.2] = 0
    load[snapshots // 2, 0] = 0
    load[:, -1] = 0
    return load


@pytest.mark.parametrize("persistence", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("decay", [1.0, 0.9])
@pytest.mark.parametrize("snapshots", [2, 3, 20, 32])
def test_the_kernel_computes_what_is_written_out(snapshots, decay, persistence):
    load = random_window(snapshots, 4, 9)
    slow = expected_slowly(load.tolist(), decay, persistence)
    torch.testing.assert_close(expected_load(load, decay, persistence), slow)


@pytest.mark.parametrize("idle", [1, 20, 740, 3000])
def test_idle_snapshots_at_the_end_change_nothing_of_the_forecast(idle):
    load = torch.randint(50, 100, (60, 2, 9), generator=torch.Generator().manual_seed(0)).double()
    padded = torch.nn.functional.pad(load, (0, 0, 0, 0, 0, idle))
    padded[-1, 1] = 70  # the other layer is not idle to the end
    found, wanted = (expected_load(x, 1.0, 0.7)[:, 0].sum(0) for x in (padded, load))
    torch.testing.assert_close(found, wanted)
    assert eplb.plan(padded, eplb.Topology(num_ranks=3, num_slots=12)).balancedness > 0.9


def test_long_windows_are_condensed_first():
    generator = torch.Generator().manual_seed(0)
    load = torch.randint(40, 60, (100, 3, 12), generator=generator).double()
    moved = expected_load(load, 0.975, 0.7)
    assert moved.shape == condense(load, 0.975).shape
    tokens = moved.sum(2, keepdim=True)
    torch.testing.assert_close(tokens, condense(load, 0.975).sum(2, keepdim=True))
    # Every snapshot is moved by the same shares.
    shift = moved / tokens - condense(load, 0.975) / tokens
    torch.testing.assert_close(shift, shift[:1].expand_as(shift))
    for layer in range(3):
        rows = load[:, layer].tolist()
        whole, moment, aged = (mean_share(rows, rate) for rate in (1.0, RECENCY, 0.975))
        lasts = lasting(rows, 0.7)
        wanted = [w + lasts * (m - w) - a for w, m, a in zip(whole, moment, aged, strict=True)]
        torch.testing.assert_close(shift[0, layer], torch.tensor(wanted, dtype=torch.float64))


@pytest.mark.parametrize("decay", [1.0, 0.95, 0.5])
@pytest.mark.parametrize("snapshots", [1, 2, 31, 32, 33, 40, 63, 65, 128, 200])
def test_bins_keep_the_weighted_sum_and_the_order_of_time(snapshots, decay):
    load = torch.arange(1, snapshots + 1, dtype=torch.float64)[:, None, None].expand(-1, 2, 3)
    condensed = condense(load, decay)
    weighted = load * torch.tensor([decay**age for age in reversed(range(snapshots))])[:, None, None]
    torch.testing.assert_close(condensed.sum(0), weighted.sum(0))
    assert 1 <= condensed.shape[0] <= min(32, snapshots)
    # Each bin is a run of snapshots, and the runs follow each other.
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


def test_a_window_that_counts_alike_stays_as_it_is():
    load = random_window(24, 3, 8)
    assert torch.equal(expected_load(load, 1.0, 0.0), load)
    assert torch.equal(expected_load(load[:1], 0.9, 0.7), load[:1])


def test_noise_alone_moves_nothing_much():
    """Of traffic whose mean never changes, nearly nothing of what the last snapshots add is believed."""
    generator = torch.Generator().manual_seed(1)
    load = torch.poisson(torch.full((128, 40, 64), 50.0, dtype=torch.float64), generator=generator)
    believed = [lasting(load[:, layer].tolist(), 1.0) for layer in range(40)]
    assert sum(believed) / 40 < 0.1
    ramp = torch.linspace(0.5, 1.5, 128, dtype=torch.float64)[:, None, None]
    moving = load * ramp ** (torch.arange(64) % 2)
    assert min(lasting(moving[:, layer].tolist(), 1.0) for layer in range(40)) > 0.8


def test_busy_snapshots_say_no_more_about_shares_than_quiet_ones():
    load = random_window(8, 2, 6) + 1
    busy = load * torch.tensor([1, 50, 3, 1, 7, 20, 1, 9], dtype=torch.float64)[:, None, None]
    few, many = (expected_load(x, 0.9, 0.7) for x in (load, busy))
    torch.testing.assert_close(few / few.sum(2, keepdim=True), many / many.sum(2, keepdim=True))


@given(
    st.lists(
        st.lists(st.floats(0, 1e290, allow_subnormal=True), min_size=3, max_size=3), min_size=2, max_size=40
    ),
    st.sampled_from([0, 1, 700]),
    st.floats(0.01, 1),
    st.floats(0, 1),
)
@settings(max_examples=200, deadline=None)
def test_no_load_makes_anything_but_a_load(rows, idle, decay, persistence):
    load = torch.tensor(rows + [[0.0] * 3] * idle, dtype=torch.float64)
    moved = expected_load(load[:, None], decay, persistence)
    assert torch.isfinite(moved).all()
    assert (moved >= 0).all()


def test_planning_for_what_is_expected_is_worth_it():
    # Topics that come and go; both scored on steps that no plan has seen.
    trace = generate("glm-5.2", layers=4, experts=64, steps=1024, drift=1.5, period=768, seed=3)
    topology = eplb.Topology(num_ranks=8, num_slots=72)
    expecting, remembering = (
        simulate(trace, topology, "adaptive", 128, planner=eplb.PlannerOptions(persistence=share))
        for share in (0.7, 0.0)
    )
    assert expecting.balancedness > remembering.balancedness + 0.005


def test_an_expert_that_is_getting_hot_gets_replicas_before_it_is_hot_on_the_mean():
    load = torch.full((32, 1, 8), 100.0, dtype=torch.float64)
    load[:, 0, 0] += torch.linspace(0, 400, 32, dtype=torch.float64)
    topology = eplb.Topology(num_ranks=8, num_slots=16)
    of_the_mean, of_the_moment = (
        eplb.plan(load, topology, options=eplb.PlannerOptions(persistence=share)) for share in (0.0, 1.0)
    )
    last = load[-1:]
    peaks = [
        float(eplb.rank_loads(last, plan.placement, topology).max()) for plan in (of_the_mean, of_the_moment)
    ]
    counts = [int(plan.placement.replica_count[0, 0]) for plan in (of_the_mean, of_the_moment)]
    assert counts[0] < counts[1]
    assert peaks[1] < peaks[0]
