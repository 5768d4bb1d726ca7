"""The dashboard, the documentation and the series: each names what the others name."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from eplb_plugin import Placement, RebalanceReport, Topology
from eplb_plugin.observability.prometheus import Telemetry

ROOT = Path(__file__).resolve().parents[1]
DASHBOARD = json.loads((ROOT / "configs" / "grafana-dashboard.json").read_text(encoding="utf-8"))
DOCS = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
OURS = re.compile(r"\beplb_\w+")


@pytest.fixture(scope="module")
def shown():
    """All series of a rebalance: type and values of each label, by name."""
    registry = CollectorRegistry()
    model = Telemetry(registry).of("tiny")
    seconds = {f"{phase}_seconds": 1.0 for phase in ("gather", "plan", "transfer", "commit")}
    load, placement = torch.ones(1, 1, 2), Placement.default(1, 2, 2)
    report = RebalanceReport(
        skipped=False,
        reason="",
        balancedness_before=0.5,
        balancedness_after=0.9,
        sampled_balancedness_even=0.8,
        sampled_balancedness=0.95,
        layers=1,
        moves=1,
        bytes_moved=1,
        move_cost_seconds=0.1,
        gain_seconds=0.5,
        **seconds,
    )
    for what in ({}, {"skipped": True}, {"failed": True}):
        model.rebalanced(replace(report, **what), load, placement, Topology(num_ranks=2, num_slots=2))
    series = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            if not sample.name.endswith("_created"):
                labels = series.setdefault(sample.name, (family.type, {}))[1]
                for label, value in sample.labels.items():
                    labels.setdefault(label, set()).add(value)
    return series


def queries():
    """(panel, expression) of each query."""
    return [(panel, target["expr"]) for panel in DASHBOARD["panels"] for target in panel["targets"]]


def test_the_names_say_what_is_counted(shown):
    assert len(shown) == 12
    for name, (kind, _) in shown.items():
        assert (kind == "counter") == name.endswith("_total"), name
        if kind == "gauge":
            assert name.endswith(("_ratio", "_steps_since_rebalance", "_active")), name


def test_the_dashboard_shows_every_series_and_no_other(shown):
    names = {name for _, expression in queries() for name in OURS.findall(expression)}
    assert names == set(shown)
    for variable in DASHBOARD["templating"]["list"]:
        assert set(OURS.findall(str(variable["query"]))) <= set(shown)


def test_the_queries_use_labels_that_there_are(shown):
    for panel, expression in queries():
        (name,) = set(OURS.findall(expression))
        kind, labels = shown[name]
        # A scrape adds `instance`.
        known = {*labels, "instance"}
        (selector,) = re.findall(r"\{(.*?)\}", expression)
        for label, _, value in re.findall(r'(\w+)(=~?)"(.*?)"', selector):
            assert label in known, panel["title"]
            assert value.startswith("$") or value in labels[label], panel["title"]
        (grouped,) = re.findall(r"by \((.*?)\)", expression)
        assert set(grouped.split(", ")) <= known
        assert set(re.findall(r"\{\{(\w+)\}\}", panel["targets"][0]["legendFormat"])) <= known
        # A counter alone says little; a gauge has no rate.
        assert bool(re.search(r"\b(rate|increase)\(", expression)) == (kind == "counter"), panel["title"]


def test_units_fit_the_series():
    units = {"ratio": "percentunit", "bytes_total": "Bps", "seconds_total": "percentunit"}
    for panel, expression in queries():
        (name,) = set(OURS.findall(expression))
        wanted = next((unit for end, unit in units.items() if name.endswith(end)), "short")
        assert panel["fieldConfig"]["defaults"]["unit"] == wanted, panel["title"]


def test_panels_have_a_place_of_their_own_and_a_description():
    taken = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
        assert panel["title"]
        assert panel["description"].endswith(".")
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))


def test_the_documentation_lists_every_series_with_its_type_and_labels(shown):
    rows = re.findall(r"^\| `(eplb_\w+)` \| (\w+) \| (.*?) \|", DOCS, re.MULTILINE)
    documented = {name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}
    assert documented == {
        name: (kind, set(labels) - {"model_name"}) for name, (kind, labels) in shown.items()
    }
    for _, labels in shown.values():
        for label in ("result", "phase", "split", "cause"):
            assert all(f"`{value}`" in DOCS for value in labels.get(label, set()))
    assert set(OURS.findall(DOCS)) - {"eplb_plugin"} == set(shown)
