"""A plugin for SGLang that makes this package's planner raise as soon as a certain file exists."""

import os
from pathlib import Path


def register():
    switch = os.environ.get("TEST_PLANNER_FAILS_WHEN")
    if switch is None:
        return
    from eplb_plugin.integration.common.planner import EnginePlanner

    plan = EnginePlanner.plan

    def plan_or_fail(self, window, topology, current):
        if Path(switch).exists():
            raise RuntimeError("this planner fails on purpose")
        return plan(self, window, topology, current)

    EnginePlanner.plan = plan_or_fail
