"""The command `advise`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from eplb_plugin.advisor.machine import model_preset
from eplb_plugin.cli import app, main
from eplb_plugin.formats.npz import save_load_trace

REAL = Path(__file__).resolve().parents[3] / "shared" / "traces"


def run(*args):
    result = CliRunner().invoke(app, ["advise", *[str(arg) for arg in args]])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_command(tmp_path, monkeypatch, steady):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    save_load_trace(tmp_path / "load.npz", steady)
    ask = [
        tmp_path / "load.npz",
        "--ranks",
        4,
        "--expert-mb",
        10,
        "--interval",
        8,
        "--move-price",
        0,
        "--json",
    ]
    out = run(*ask, "--redundant", 0, "--redundant", 4)
    content = json.loads(out.splitlines()[-1])
    assert [item["slots"] for item in content["tried"]] == [32, 36]
    assert content["best"] in content["tried"]
    assert content["worth_it"]
    assert content["safe"]
    assert content["cached"] == 0
    assert " ".join(content["said"]) in " ".join(out.split())
    assert f"{content['tried'][1]['balancedness']:.4f}" in out
    # 4 redundant experts on 4 ranks: one more in each of 2 layers.
    assert content["tried"][1]["replica_bytes"] == 2 * 10e6
    again = json.loads(run(*ask, "--redundant", 0, "--redundant", 4).splitlines()[-1])
    assert again == {**content, "cached": 3}
    slow = json.loads(run(*ask, "--redundant", 4, "--bandwidth", 40).splitlines()[-1])
    assert slow["cached"] >= 1
    (here,) = slow["tried"]
    assert here["moves"] > 0
    assert here["transfer_seconds"] == pytest.approx(10 * content["tried"][1]["transfer_seconds"])
    assert here["net"] < content["tried"][1]["net"]


def test_profiles_know_their_model(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    few = ["--steps", 16, "--interval", 4, "--redundant", 0, "--move-price", 0, "--json"]
    content = json.loads(run("gpt-oss-20b", *few).splitlines()[-1])
    expected = model_preset("gpt-oss-20b").bytes_per_expert
    assert not any("are recorded" in line for line in content["said"])
    # 40 ms a step: 22500 rebalances an hour.
    assert content["best"]["bytes_per_hour"] == pytest.approx(content["best"]["moves"] * expected * 22500)


def test_layers_that_were_not_recorded_are_told(tmp_path, monkeypatch, steady):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    save_load_trace(tmp_path / "load.npz", steady)
    few = ["--interval", 8, "--redundant", 0, "--move-price", 0]
    out = run(tmp_path / "load.npz", "--model", "gpt-oss-20b", *few)
    assert "2 of 24 MoE layers are recorded: costs are of these." in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["LOAD"], "how large is an expert? Give --expert-mb, or --model with one of deepseek-v3"),
        (["LOAD", "--model", "x"], "no model 'x'"),
        (["LOAD", "--model", "glm-5", "--expert-mb", "3"], "both give the size of an expert"),
        (["LOAD", "--model", "glm-5"], "glm-5 has 256 experts"),
        (["LOAD", "--expert-mb", "0"], "--expert-mb: Input should be greater than 0"),
        (["LOAD", "--expert-mb", "-3"], "--expert-mb: Input should be greater than 0"),
        (["LOAD", "--expert-mb", "3", "--step-ms", "-4"], "--step-ms: -4 is not above 0"),
        (["LOAD", "--expert-mb", "3", "--bandwidth", "nan"], "--bandwidth: nan is not above 0"),
        (["LOAD", "--expert-mb", "3", "--redundant", "-1"], "--redundant: -1 is below 0"),
        (
            ["LOAD", "--expert-mb", "3", "--interval", "0"],
            "--interval: Input should be greater than or equal",
        ),
        (["LOAD", "--expert-mb", "3", "--move-price", "-1"], "--move-price: Input should be greater than"),
        (
            ["LOAD", "--expert-mb", "3", "--interval", "32"],
            "has 64 steps; with an interval of 32 none are left to score of the 32 in a half",
        ),
        (["LOAD", "--expert-mb", "9", "--ranks", "4", "--redundant", "3"], "num_slots=35 is not divisible"),
    ],
)
def test_errors_are_one_line(monkeypatch, capsys, tmp_path, steady, args, message):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    save_load_trace(tmp_path / "load.npz", steady)
    given = [str(tmp_path / "load.npz") if arg == "LOAD" else arg for arg in args]
    monkeypatch.setattr(sys, "argv", ["eplb-plugin", "advise", *given])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.skipif(not REAL.is_dir(), reason="no recorded traces beside the repository")
def test_recorded_traffic(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    few = ["--redundant", 8, "--move-price", 0.012, "--json"]
    decode = [
        REAL / "gpt_oss_20b_decode_tokens.npz",
        "--model",
        "gpt-oss-20b",
        "--steps",
        512,
        "--interval",
        64,
    ]
    content = json.loads(run(*decode, *few).splitlines()[-1])
    test = content["back_test"]
    assert content["safe"]
    assert abs(test["predicted"] - test["measured"]) < 0.02
    # In the order of the file, one kind of text follows the other.
    prefill = [
        REAL / "deepseek_v2_lite_prefill_tokens.npz",
        "--model",
        "deepseek-v2-lite",
        "--mode",
        "prefill",
    ]
    content = json.loads(run(*prefill, "--max-tokens", 256, "--interval", 4, *few).splitlines()[-1])
    assert content["back_test"]["similarity"] < 0.5
    assert not content["safe"]
