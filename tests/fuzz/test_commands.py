"""The commands on damaged files and absurd numbers: one line, an exit code, no traceback, no file written."""

from __future__ import annotations

import random
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eplb_plugin.cli import main
from eplb_plugin.formats.loads import LOAD_FORMATS, write_load
from eplb_plugin.offline.traces import LoadTrace
from eplb_plugin.planning.planner import warmup

from .effort import effort
from .parsers import PARSERS, odd

COMMANDS = {
    "plan": lambda file, out: ["plan", file, "-o", out, "--ranks", "2"],
    "convert": lambda file, out: ["convert", file, out, "--to", "csv"],
    "report": lambda file, out: ["report", file, "-o", out, "--ranks", "2", "--interval", "1"],
    "map": lambda file, out: ["report", "--map", file, "--ranks", "2"],
    "simulate": lambda file, out: ["simulate", file, "--ranks", "2", "--interval", "1"],
}
LOADS = ["load", "tokens", "sglang", "benchmark", "csv"]


@pytest.fixture(autouse=True, scope="module")
def _planner_is_loaded():
    """So that no command tells that it takes long, a line that would be there or not by the machine."""
    warmup()


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch):
    """Of tokens; not by an option, which loads that were recorded would be refused."""
    monkeypatch.setenv("EPLB_PLUGIN_SIMULATE__STEPS", "4")


def run(monkeypatch, capsys, *args):
    """The exit code and what was said on standard error."""
    monkeypatch.setattr(sys, "argv", ["eplb-plugin", *map(str, args)])
    with pytest.raises(SystemExit) as caught:
        main()
    return caught.value.code or 0, capsys.readouterr().err


def refused(monkeypatch, capsys, *args):
    code, said = run(monkeypatch, capsys, *args)
    assert code == 2
    (line,) = said.strip().splitlines()
    assert line.startswith("eplb-plugin: ")
    return line


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"[" * 10_000, b"\xff\xfe", b"\x80\x02."])
def test_files_that_are_nothing(command, content, tmp_path, monkeypatch, capsys):
    for suffix in (".npz", ".pt", ".json", ".csv", ".yaml", ""):
        path = tmp_path / f"load{suffix}"
        path.write_bytes(content)
        refused(monkeypatch, capsys, *COMMANDS[command](path, tmp_path / "out"))
        path.unlink()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["plan", "convert", "simulate"])
@pytest.mark.parametrize("name", LOADS)
@effort(6)
@given(seed=st.integers(0, 2**32))
def test_damaged_files(command, name, tmp_path, monkeypatch, capsys, seed):
    path = tmp_path / PARSERS[name].file
    path.write_bytes(odd(PARSERS[name], random.Random(seed)))
    code, said = run(monkeypatch, capsys, *COMMANDS[command](path, tmp_path / "out"))
    assert code in (0, 2)
    assert "Traceback" not in said
    if code:
        (line,) = said.strip().splitlines()
        assert line.startswith("eplb-plugin: ")


def _joined(options):
    return " ".join(map(str, options))


@pytest.fixture
def load_file(tmp_path):
    path = tmp_path / "load.npz"
    write_load(path, LoadTrace(torch.ones(4, 2, 6, dtype=torch.int32)), LOAD_FORMATS["npz"])
    return path


@pytest.fixture
def token_file(tmp_path):
    path = tmp_path / "tokens.npz"
    path.write_bytes(PARSERS["tokens"].starts[0])
    return path


@pytest.mark.parametrize(
    "options",
    [
        ["--ranks", "0"],
        ["--ranks", 10**12],
        ["--slots", 10**15],
        ["--slots", "-3"],
        ["--slots", "7", "--ranks", "2"],
        ["--nodes", "3"],
        ["--groups", "0"],
        ["--interval", 10**30],
        ["--interval", "0"],
        ["--policy", "best"],
        ["--mode", "both"],
        ["--drift", "nan"],
        ["--drift", "1e400"],
        ["--seed", "-1"],
        ["--config", "/"],
    ],
    ids=_joined,
)
def test_absurd_options(options, load_file, monkeypatch, capsys):
    refused(monkeypatch, capsys, "simulate", load_file, "--ranks", 2, "--interval", 1, *options)


@pytest.mark.parametrize(
    "options",
    [
        ["--steps", 10**15],
        ["--steps", 2**25],
        ["--batch", 10**15],
        ["--mode", "prefill", "--max-tokens", "0"],
    ],
    ids=_joined,
)
def test_absurd_replays(options, token_file, monkeypatch, capsys):
    refused(monkeypatch, capsys, "simulate", token_file, "--ranks", 2, "--interval", 1, *options)


def test_absurd_traffic(monkeypatch, capsys):
    assert "too much memory" in refused(monkeypatch, capsys, "simulate", "deepseek-v3", "--steps", 2**24)
    refused(monkeypatch, capsys, "simulate", "deepseek-v3", "--interval", 10**20)


@pytest.mark.parametrize("layer", [-1, 2**16, 10**30])
def test_absurd_layers(layer, load_file, tmp_path, monkeypatch, capsys):
    for suffix in LOAD_FORMATS.values():
        if suffix.suffix:
            out = tmp_path / f"out{suffix.suffix}"
            refused(monkeypatch, capsys, "convert", load_file, out, "--first-layer", layer)
            assert not out.exists()


def test_a_placement_that_is_none(load_file, tmp_path, monkeypatch, capsys):
    placement = tmp_path / "map.json"
    for content in (b"", b"[", b"[" * 10_000, b"{}", b'{"physical_to_logical_map": [[9], [9]]}', b"\xff"):
        placement.write_bytes(content)
        out = tmp_path / "out.json"
        refused(monkeypatch, capsys, *COMMANDS["plan"](load_file, out), "--current", placement)
        assert not out.exists()


def test_absurd_numbers_of_experts_in_tokens(token_file, monkeypatch, capsys):
    arrays = dict(np.load(token_file))
    np.savez(token_file, **{**arrays, "num_experts": np.int64(10**12)})
    assert "num_experts=1000000000000" in refused(monkeypatch, capsys, "simulate", token_file)
