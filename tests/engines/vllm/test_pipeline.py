"""A pipeline of two stages with two tensor-parallel ranks each: every stage balances layers of its own."""

import json
import re

import pytest

from eplb_plugin.formats.recordings import read_recording
from tests.series import samples

from .conftest import LIMIT, RESTLESS, drive, eplb_arguments, llm_arguments

pytestmark = pytest.mark.timeout(LIMIT)

STEPS = [
    {
        "name": "serving",
        "before": [["watch"]],
        "rounds": 2,
        "traffic": True,
        "report": True,
    },
    {"name": "served", "before": [["show_metrics"]], "rounds": 0},
]


def test_each_stage_balances_its_own_layers_and_says_which(model, expected, tmp_path):
    arguments = llm_arguments(model, 2, **eplb_arguments(use_async=True), pipeline_parallel_size=2)
    record = tmp_path / "recorded"
    options = RESTLESS | {"metrics": True, "record": str(record)}
    arguments["additional_config"] = {"eplb_plugin": options}
    result = drive(tmp_path, {"llm": arguments, "steps": STEPS}, 4)
    step = result["steps"]["serving"]
    assert all(tokens == expected for tokens in step["rounds"])
    names = [f"{model}, stage 1 of 2, MoE layers 0 to 1", f"{model}, stage 2 of 2, MoE layers 2 to 3"]

    # Ranks are numbered within their stage: stage by stage, as vLLM numbers its workers.
    assert [rank["rank"] for rank in step["report"]] == [0, 1, 0, 1]
    for place, rank in enumerate(step["report"]):
        ((name, about),) = rank["models"].items()
        assert name == names[place // 2]
        assert about["failures"] == 0
        # vLLM's runner on CPUs counts no steps of the first stage; the one on accelerators does, as the shim.
        assert about["warnings"] == ({"never_stepped": 1} if place < 2 else {})
        assert sum(report["moves"] > 0 for report in about["reports"]) >= 4
    for stage in range(2):
        checks = [
            json.loads(path.read_text()) for path in (tmp_path / f"stage-{stage}").glob("checks-*.json")
        ]
        assert [rank["wrong"] for rank in checks] == [[], []]
        assert min(rank["changes"] for rank in checks) >= 4

    # The first rank of each stage speaks, and shows its metrics under the name of the stage.
    for stage, name in enumerate(names):
        said = [line for line in result["log"].splitlines() if re.search(r"\] rebalance \d+ of ", line)]
        mine = [line for line in said if f" of {name}: " in line]
        assert len(mine) >= 4
        assert all(f"Worker_PP{stage}_TP0_EP0 " in line for line in mine)
        shown = samples(result["show_metrics"][2 * stage])
        assert shown[f"eplb_rebalances_total{{{name},applied}}"] >= 4
        assert not any(other in key for key in shown for other in names if other != name)
    told = (
        f"{names[0]}: vLLM's model runner V1 counts no steps of the stages of a pipeline before the last one"
    )
    assert result["log"].count(told) == 1
    assert result["log"].count("counts no steps") == 1

    # Recorded by stage, with the model's numbers of layers.
    for folder, layers in ((record, (0, 1)), (record / "stage-1", (2, 3))):
        assert read_recording(folder).newest.layer_ids == layers
