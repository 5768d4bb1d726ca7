"""A machine, and results of trials that nobody made."""

from __future__ import annotations

from dataclasses import replace

from eplb_plugin.advisor.advice import Advice, BackTest, Rated
from eplb_plugin.advisor.machine import Cost, Machine
from eplb_plugin.advisor.trial import Setting, Trial
from eplb_plugin.config.options import PlannerOptions, RebalancerOptions

PLANNER, REBALANCER = PlannerOptions(), RebalancerOptions(history=2)


def machine_of(**changes):
    numbers = {"ranks": 4, "nodes": 2, "groups": 1, "bytes_per_expert": 1e7, "bandwidth": 4e11}
    return Machine(**{**numbers, "node_bandwidth": 5e10, "step_seconds": 0.05, **changes})


def rated(slots, net, hourly=1.0):
    cost = Cost(bytes_per_hour=hourly, transfer_seconds=0.0, transfer_share=0.0, replica_bytes=0.0)
    trial = Trial(
        balancedness=0.9, rebalances=2, first_moves=1, moves=1.0, busiest_within=0.0, busiest_between=0.0
    )
    return Rated(Setting(slots, 8, 0.01), trial, net, cost, net)


def advice_of(static=0.6, best=0.8, measured=0.8, test_static=0.6, alike=0.95, share=0.0):
    item = rated(36, 1.0)
    item = replace(
        item,
        trial=item.trial.model_copy(update={"balancedness": best}),
        speedup=best / static,
        cost=replace(item.cost, transfer_share=share),
        net=best / static * (1 - share),
    )
    return Advice(
        static, (item,), item, BackTest(best, measured, test_static, alike, measured / test_static), 0
    )
