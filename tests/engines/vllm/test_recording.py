"""Evidence before enabling: the real engine observes and records, and `advise` says what to enable."""

import json

import pytest
import torch
import yaml
from typer.testing import CliRunner

from eplb_plugin import Placement, Topology
from eplb_plugin.cli import app
from eplb_plugin.formats.recordings import read_interval, read_recording, recorded_files

from .conftest import LIMIT, drive, eplb_arguments, llm_arguments
from .prompts import NEW_TOKENS, PROMPTS

pytestmark = pytest.mark.timeout(2 * LIMIT)

INTERVAL, TOP_K = 16, 4


@pytest.fixture(scope="module")
def observed(model, tmp_path_factory):
    """Two ranks observe for 200 steps; then recording is stopped, and started elsewhere."""
    folder = tmp_path_factory.mktemp("observed")
    arguments = llm_arguments(model, 2, **eplb_arguments(use_async=True))
    arguments["eplb_config"] |= {
        "num_redundant_experts": 0,
        "step_interval": INTERVAL,
        "window_size": INTERVAL,
    }
    record = str(folder / "recorded")
    arguments["additional_config"] = {"eplb_plugin": {"enabled": True, "mode": "observe", "record": record}}
    each = {"report": True}
    steps = [
        {"name": "observing", "before": [["watch"]], "rounds": 4, "traffic": True, **each},
        {"name": "stopped", "before": [["eplb_plugin_record", None]], "rounds": 2, **each},
        {"name": "elsewhere", "before": [["eplb_plugin_record", str(folder / "more")]], "rounds": 2, **each},
    ]
    scenario = {"llm": arguments, "steps": steps, "watched": str(folder)}
    return drive(folder, scenario, 2) | {"folder": folder}


def test_nothing_changes(observed, expected):
    for step in observed["steps"].values():
        assert all(tokens == expected for tokens in step["rounds"])
        assert [checks["changes"] for checks in step["checks"]] == [0, 0]
        for rank in step["report"]:
            (model,) = rank["models"].values()
            assert model["failures"] == 0
            for report in model["reports"]:
                assert (report["moves"], report["skipped"]) == (0, True)
                assert report["reason"] in ("mode observe plans nothing", "no load was seen")
    seen = [report["balancedness_before"] for report in model["reports"] if "observe" in report["reason"]]
    assert len(seen) >= 12
    assert all(0.5 < value < 1 for value in seen)


def test_the_recording_says_what_the_engine_did(observed):
    files = recorded_files(observed["folder"] / "recorded")
    assert len(files) >= 12
    read = read_recording(observed["folder"] / "recorded")
    assert read.left_out == ()
    assert read.newest.topology == Topology(num_ranks=2, num_slots=16)
    assert read.newest.placement == Placement.default(4, 16, 16)
    assert read.newest.layer_ids == (0, 1, 2, 3)
    assert read.newest.steps == INTERVAL
    assert read.newest.engine == "vLLM"
    assert read.newest.expert_bytes == 3 * 128 * 64 * 4, "three matrices in float32"
    assert 0.0005 < read.step_seconds < 5
    # Each token is counted once, although both ranks have all of them.
    assert read.trace.samples.shape[1:] == (4, 16)
    tokens = read.trace.samples.sum(2)
    assert bool((tokens == tokens[:, :1]).all())
    assert int(tokens[:, 0].mode().values) == TOP_K * len(PROMPTS)
    for file in files[1:]:
        interval = read_interval(file)
        assert len(interval.snapshots) == INTERVAL
        assert int(interval.snapshots.sum(2).max()) <= TOP_K * len(PROMPTS) * 16
        assert torch.equal(interval.samples, interval.snapshots), "sums of one step, and every step sampled"


def test_recording_stops_and_starts_on_request(observed):
    steps, folder = observed["steps"], observed["folder"]
    written = [
        [next(iter(rank["models"].values()))["recorded"] for rank in step["report"]]
        for step in steps.values()
    ]
    # The last rank to be asked answers last: `before` keeps the answers of the latest call.
    assert observed["eplb_plugin_record"] == [str(folder / "more"), None]
    (first, other), stopped, (more, _) = written
    assert other is None
    assert first["folder"] == str(folder / "recorded")
    # Files are written beside serving: the newest may have come after the report.
    files = len(recorded_files(folder / "recorded"))
    assert files - 1 <= first["written"] <= files
    assert stopped == [None, None]
    assert 1 <= len(recorded_files(folder / "more")) <= 2 * NEW_TOKENS // INTERVAL + 1
    assert (first["lost"], more["lost"]) == (0, 0)
    (model,) = steps["observing"]["report"][0]["models"].values()
    with_load = [report for report in model["reports"] if "observe" in report["reason"]]
    assert files == len(with_load), "one file for each interval with a load"
    log = observed["log"]
    assert "eplb_plugin: loads of" in log
    assert "observes" in log


def test_advise_needs_nothing_else_and_its_answer_is_taken(observed, model, expected, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    result = CliRunner().invoke(app, ["advise", str(observed["folder"] / "recorded"), "--json"])
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout.splitlines()[-1])
    assert 1 < content["static"] ** -1 < 2
    assert content["best"]["balancedness"] > content["static"]
    eplb, ours = (yaml.safe_load(part) for part in content["enable"].split("'")[1::2])
    arguments = llm_arguments(model, 2, **eplb_arguments(use_async=False))
    arguments |= {"eplb_config": arguments["eplb_config"] | eplb, "additional_config": ours}
    steps = [{"name": "enabled", "before": [["watch"]], "rounds": 2, "traffic": True, "report": True}]
    served = drive(tmp_path, {"llm": arguments, "steps": steps, "watched": str(tmp_path)}, 2)
    step = served["steps"]["enabled"]
    assert all(tokens == expected for tokens in step["rounds"])
    reports = next(iter(step["report"][0]["models"].values()))["reports"]
    planned = [report for report in reports if report["window_balancedness_after"] is not None]
    assert planned
    assert all(not report["failed"] and "observe" not in report["reason"] for report in planned)
    assert all(checks["wrong"] == [] for checks in step["checks"])
