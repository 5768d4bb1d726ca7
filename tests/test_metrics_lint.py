"""What the metrics server serves, by the rules of `promtool check metrics`, and by promtool where it is."""

from __future__ import annotations

import re
import shutil
import subprocess
import urllib.request
from dataclasses import replace

import pytest
import torch

import eplb_plugin as eplb
from eplb_plugin.observability.prometheus import METRICS

PROMTOOL = shutil.which("promtool")
# Of Prometheus's linter: units that are not base units, and abbreviated ones.
_NOT_BASE = re.compile(
    r"_(?:(?:nano|micro|milli)seconds?|minutes?|hours?|days?|weeks?|percents?|"
    r"(?:kilo|mega|giga|tera|kibi|mebi|gibi)?bits?|(?:kilo|mega|giga|tera|kibi|mebi|gibi)bytes?|"
    r"ns|us|ms|s|m|h|d|kb|mb|gb|tb|b)(?:_|$)"
)
_TYPES = ("counter", "gauge", "histogram", "summary", "untyped")


def complaints(text: str) -> list[str]:
    """Violations of the linter's rules in an exposition: help, units, suffixes, names, labels, order."""
    found, types, helps, samples = [], {}, {}, {}
    for line in text.splitlines():
        if line.startswith("# "):
            word, name, rest = re.fullmatch(r"# (HELP|TYPE) (\S+) ?(.*)", line).groups()
            known = helps if word == "HELP" else types
            if name in known:
                found.append(f"{name}: {word} twice")
            known[name] = rest
        elif line:
            name, labels = re.match(r"([^\s{]+)(?:\{(.*)\})? ", line).groups()
            samples.setdefault(name, set())
            keys = re.findall(r'(\w+)="', labels or "")
            found += [f"{name}: label {key}" for key in keys if not re.fullmatch(r"[a-z][a-z0-9_]*", key)]
            found += [f"{name}: reserved label {key}" for key in keys if key in ("le", "quantile")]
            if labels in samples[name]:
                found.append(f"{name}: sample twice")
            samples[name].add(labels)
    for name in samples:
        kind = types.get(name)
        if kind not in _TYPES:
            found.append(f"{name}: no type")
        if not helps.get(name):
            found.append(f"{name}: no help text")
        if kind == "counter" and not name.endswith("_total"):
            found.append(f"{name}: a counter without _total")
        if kind != "counter" and name.endswith("_total"):
            found.append(f"{name}: _total without being a counter")
        if kind not in ("histogram", "summary") and name.endswith(("_bucket", "_count", "_sum")):
            found.append(f"{name}: suffix of a histogram")
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            found.append(f"{name}: not lower case with underscores")
        if _NOT_BASE.search(name):
            found.append(f"{name}: not a base unit")
        found += [f"{name}: type {word} in its name" for word in _TYPES if word in name.split("_")]
    return found


def promtool(text: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [PROMTOOL, "check", "metrics"], input=text, text=True, capture_output=True, timeout=60, check=False
    )


@pytest.fixture(scope="module")
def served():
    """The text of a server after two rebalances: one with load, one without."""
    options = eplb.RebalancerOptions(mode="sync", interval=3, snapshots=3, history=1, dispatch="balanced")
    hot = torch.tensor([[0, 1, 0, 1, 2, 3, 4, 5]]).repeat(2, 1)
    topology = eplb.Topology(num_ranks=1, num_slots=8)
    balancer = eplb.Rebalancer(topology, 2, 6, placement=eplb.Placement(hot, 6), options=options)
    server = eplb.serve_metrics(balancer, eplb.MetricsOptions(enabled=True, port=0), model="tiny")
    for step in range(7):
        for layer in range(2 * (step < 3)):
            balancer.record_counts(layer, torch.tensor([90, 60, 1, 1, 1, 1]))
        balancer.step()
    # Moves cost nothing that is known to a loop without weights.
    priced = replace(balancer.reports[-1], move_cost_seconds=0.1, gain_seconds=2.0)
    balancer.observer.rebalanced(priced)
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=60) as answer:
        yield answer.read().decode()
    server.close()


def test_what_is_served_follows_the_rules(served):
    assert complaints(served) == []
    # Every metric is looked at, those with a second label under each of its values.
    assert {metric.name for metric in METRICS} <= set(re.findall(r"^(\w+)\{", served, re.MULTILINE))


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (Debian package prometheus)")
def test_promtool_passes_what_is_served(served):
    done = promtool(served)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


BAD = {
    "help": "# TYPE eplb_a_ratio gauge\neplb_a_ratio 1\n",
    "counter": "# HELP eplb_moves Moves.\n# TYPE eplb_moves counter\neplb_moves 1\n",
    "gauge": "# HELP eplb_moves_total Moves.\n# TYPE eplb_moves_total gauge\neplb_moves_total 1\n",
    "milliseconds": "# HELP eplb_plan_milliseconds Time.\n# TYPE eplb_plan_milliseconds gauge\n"
    "eplb_plan_milliseconds 1\n",
    "abbreviated": "# HELP eplb_plan_ms Time.\n# TYPE eplb_plan_ms gauge\neplb_plan_ms 1\n",
    "percent": "# HELP eplb_moved_percent Share.\n# TYPE eplb_moved_percent gauge\neplb_moved_percent 1\n",
    "type": "# HELP eplb_gauge_ratio Share.\n# TYPE eplb_gauge_ratio gauge\neplb_gauge_ratio 1\n",
    "suffix": "# HELP eplb_moves_count Moves.\n# TYPE eplb_moves_count gauge\neplb_moves_count 1\n",
    "case": "# HELP eplb_movedExperts Moves.\n# TYPE eplb_movedExperts gauge\neplb_movedExperts 1\n",
    "label": '# HELP eplb_a_ratio A.\n# TYPE eplb_a_ratio gauge\neplb_a_ratio{modelName="a"} 1\n',
    "reserved": '# HELP eplb_a_ratio A.\n# TYPE eplb_a_ratio gauge\neplb_a_ratio{le="1"} 1\n',
}


@pytest.mark.parametrize("case", BAD)
def test_the_rules_find_what_promtool_finds(case):
    assert complaints(BAD[case])
    # A ratio in place of percents is a convention, which promtool does not check.
    if PROMTOOL is not None and case != "percent":
        assert promtool(BAD[case]).returncode != 0
