"""The report: pictures that show what they say, and a page that needs nothing else."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from eplb_plugin.cli import app
from eplb_plugin.config.options import PlannerOptions, RebalancerOptions
from eplb_plugin.core.balancedness import balancedness, rank_loads
from eplb_plugin.core.errors import ConfigError, EplbError, TraceError
from eplb_plugin.core.placement import Placement
from eplb_plugin.core.topology import Topology
from eplb_plugin.formats.npz import save_load_trace
from eplb_plugin.offline.simulation import simulate
from eplb_plugin.offline.synthetic_traffic import generate
from eplb_plugin.offline.traces import LoadTrace
from eplb_plugin.report import figures
from eplb_plugin.report.page import picture_set, write_page
from eplb_plugin.report.replay import replay

TOPOLOGY = Topology(num_ranks=4, num_slots=36)
OPTIONS = RebalancerOptions(interval=8, history=2)
POLICIES = ("static", "greedy", "adaptive")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def trace():
    load = generate("gpt-oss-20b", layers=3, steps=36, tokens_per_step=128, period=64).load
    return LoadTrace(load, "<load> & more", (1, 3, 5))


@pytest.fixture(scope="module")
def done(trace):
    return replay(trace, TOPOLOGY, POLICIES, PlannerOptions(), OPTIONS)


def test_the_replay_is_the_simulation_and_keeps_placements(trace, done):
    for item in done.policies:
        expected = simulate(trace, TOPOLOGY, item.result.policy, 8, history=2)
        assert item.result.balancedness == expected.balancedness
        assert item.result.moved_share == expected.moved_share
        assert len(item.placements) == len(item.predicted) == len(expected.intervals) == 4
        for part, placement, predicted in zip(
            item.result.intervals, item.placements, item.predicted, strict=True
        ):
            ahead = trace.load[part.first_step : part.first_step + 8]
            assert part.balancedness == balancedness(ahead, placement, TOPOLOGY)
            past = trace.load[part.first_step - 8 : part.first_step]
            assert predicted == balancedness(past, placement, TOPOLOGY)


def test_mean_rank_loads_follow_the_placements(trace, done):
    ensemble = done.policies[2]
    total = torch.zeros(3, 4, dtype=torch.float64)
    for step in range(8, 36):
        total += rank_loads(trace.load[step], ensemble.placements[(step - 8) // 8], TOPOLOGY)[0]
    expected = total / total.mean(1, keepdim=True)
    torch.testing.assert_close(done.mean_rank_loads(ensemble), expected)


def texts(figure):
    return " | ".join(item.get_text() for item in figure.findobj(lambda item: hasattr(item, "get_text")))


def test_the_heat_maps_show_before_and_after_on_one_scale(trace, done):
    figure = figures.rank_load_maps(done, done.policies[2])
    images = [axis.images[0] for axis in figure.axes if axis.images]
    default = Placement.default(3, 32, 36)
    before = rank_loads(trace.load[8:].sum(0), default, TOPOLOGY)[0]
    np.testing.assert_allclose(images[0].get_array(), before / before.mean(1, keepdim=True))
    np.testing.assert_allclose(images[1].get_array(), done.mean_rank_loads(done.policies[2]))
    assert images[0].get_clim() == images[1].get_clim()
    assert images[0].get_cmap().name == "cividis"
    # Rows carry the numbers of the model's layers.
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["1", "3", "5"]
    assert "load of the rank / mean of its layer" in texts(figure)


def test_balancedness_and_moves_over_time(done):
    axis = figures.balancedness_over_time(done).axes[0]
    lines = {item.get_label(): item for item in [*axis.patches, *axis.lines]}
    for item in done.policies:
        name = item.result.policy
        np.testing.assert_array_equal(
            lines[name].get_data().values, [part.balancedness for part in item.result.intervals]
        )
        if name != "static":
            np.testing.assert_array_equal(lines[f"{name}, predicted"].get_ydata(), item.predicted)
    axis = figures.moves_over_time(done).axes[0]
    assert [line.get_label() for line in axis.lines] == ["greedy", "adaptive"]
    moves = [100 * part.moves / (3 * 36) for part in done.policies[2].result.intervals]
    np.testing.assert_allclose(axis.lines[1].get_ydata(), moves)
    assert "%" in axis.get_ylabel()


def test_the_hottest_experts(trace, done):
    ensemble = done.policies[2]
    axis = figures.hottest_experts(done, ensemble).axes[0]
    load = trace.load[32:].double().mean(0)
    share = (load / load.mean(1, keepdim=True)).numpy()
    hottest = sorted(((share[i, e], i, e) for i in range(3) for e in range(32)), reverse=True)[:10]
    whole, part = axis.containers
    np.testing.assert_allclose([bar.get_width() for bar in whole], [item[0] for item in hottest])
    count = [int(ensemble.placements[-1].replica_count[i, e]) for _, i, e in hottest]
    np.testing.assert_allclose(
        [bar.get_width() for bar in part], [item[0] / c for item, c in zip(hottest, count, strict=True)]
    )
    named = [label.get_text() for label in axis.get_yticklabels()]
    assert named == [f"layer {(1, 3, 5)[i]}, expert {e}" for _, i, e in hottest]
    assert f"{count[0]} replica" in texts(axis.figure)


def test_policies_are_compared_by_name_and_colour(done):
    figure = figures.policies_compared(done)
    for container, values in zip(
        [axis.containers[0] for axis in figure.axes],
        [
            [item.result.balancedness for item in done.policies],
            [100 * item.result.moved_share for item in done.policies],
        ],
        strict=True,
    ):
        np.testing.assert_allclose([bar.get_width() for bar in container], values)
        assert len({bar.get_facecolor() for bar in container}) == 3


def test_dispatches_are_compared_by_the_time_of_the_slowest_rank(trace):
    for cost in (0, 24):
        done = replay(trace, TOPOLOGY, POLICIES, PlannerOptions(), OPTIONS, expert_cost=cost)
        axis = figures.dispatches_compared(done).axes[0]
        times = [
            simulate(trace, TOPOLOGY, name, 8, history=2, dispatches=("even", "balanced"), expert_cost=cost)
            for name in POLICIES
        ]
        # Each dispatch has white bars below its own.
        for container, index in ((axis.containers[1], 0), (axis.containers[3], 1)):
            wanted = [item.dispatches[index].cost for item in times]
            np.testing.assert_allclose([bar.get_width() for bar in container], wanted)
            name = ("even", "balanced")[index]
            assert f"{name} {wanted[2]:.3f}" in texts(axis.figure)
        assert axis.get_xlabel()
        assert max(item.dispatches[0].cost for item in times) < axis.get_xlim()[1]


@pytest.mark.parametrize(
    ("cost", "message", "told"),
    [
        (
            0,
            20.0,
            "balancedness is {b:.3f}, and the experts take {s:.1%} less time than with the even split. Its "
            "message, assumed to take 20 &micro;s for each layer and batch, pays where the experts of a "
            "layer take above {e:.0f} &micro;s.",
        ),
        (
            0,
            0.0,
            "{s:.1%} less time than with the even split. It needs no message: every rank has all tokens.",
        ),
        (
            24,
            8.0,
            "the experts take {s:.1%} less time than with the even split, at an expert cost of 24 tokens. "
            "Its message, assumed to take 8 &micro;s",
        ),
    ],
)
def test_the_page_tells_what_dispatch_gains(tmp_path, trace, cost, message, told):
    done = replay(trace, TOPOLOGY, POLICIES, PlannerOptions(), OPTIONS, expert_cost=cost, message_us=message)
    balanced = done.policies[2].balanced
    saved = 1 - balanced.cost_ratio
    assert saved > 0.005
    write_page(tmp_path / "out.html", [(done, [])])
    text = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert told.format(b=balanced.balancedness, s=saved, e=message / saved) in text
    for item in done.policies:
        assert f"<td>{1 - item.balanced.cost_ratio:.1%}</td>" in text
    static, adaptive = done.policies[0], done.policies[2]
    less = 1 - adaptive.time(cost) / static.time(cost)
    assert f"they take {less:.0%} less time" in text
    if cost:
        assert adaptive.time(cost) == adaptive.result.dispatches[0].cost > adaptive.time(0)


def test_loads_in_fractions_are_reported_without_dispatch(tmp_path, trace):
    means = LoadTrace(trace.load.double() / 4)
    done = replay(means, TOPOLOGY, ("static", "adaptive"), PlannerOptions(), OPTIONS, expert_cost=24)
    assert done.policies[0].balanced is None
    assert done.policies[0].time(24) == 1 / done.policies[0].result.balancedness
    pictures = list(picture_set(done))
    assert "dispatch" not in {item.key for item in pictures}
    write_page(tmp_path / "out.html", [(done, pictures)])
    assert "Dispatch is not judged: the load has fractions of tokens" in (tmp_path / "out.html").read_text()


def test_every_picture_names_its_axes(done):
    for draw in (figures.balancedness_over_time, figures.moves_over_time):
        axis = draw(done).axes[0]
        assert axis.get_xlabel()
        assert axis.get_ylabel()
    assert figures.hottest_experts(done, done.policies[0]).axes[0].get_xlabel()


def test_the_same_replay_gives_the_same_pictures(done):
    first, second = (list(picture_set(done)) for _ in range(2))
    assert [item.png for item in first] == [item.png for item in second]
    assert len({item.key for item in first}) == 6
    for item in first:
        assert item.png.startswith(b"\x89PNG\r\n\x1a\n")


def test_layers_without_load_do_not_matter(trace):
    load = trace.load.clone()
    load[:, 0] = 0
    done = replay(LoadTrace(load), TOPOLOGY, ("adaptive",), PlannerOptions(), OPTIONS)
    assert done.mean_rank_loads(done.policies[0])[0].isnan().all()
    assert len(list(picture_set(done))) == 6


@pytest.mark.filterwarnings("error")
def test_a_policy_that_never_moves_needs_no_legend_of_moves(trace):
    done = replay(trace, TOPOLOGY, ("static",), PlannerOptions(), OPTIONS)
    assert figures.moves_over_time(done).axes[0].get_legend() is None


class References(HTMLParser):
    """Everything that a browser would fetch, and what it would run."""

    def __init__(self, text):
        super().__init__()
        self.found, self.tags = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in {"src", "href", "srcset", "data", "action", "poster", "background", "style"}:
                self.found.append(value)


@pytest.fixture(scope="module")
def page(done, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_page(path, [(done, list(picture_set(done)))])
    return path


def test_the_page_needs_nothing_else(page, done):
    text = page.read_text(encoding="utf-8")
    parsed = References(text)
    assert len(parsed.found) == 7
    assert all(item.startswith("data:") for item in parsed.found)
    assert parsed.tags.count("img") == 6
    assert not {"script", "iframe", "object", "embed", "base"} & set(parsed.tags)
    style = re.search("<style>(.*?)</style>", text, re.DOTALL).group(1)
    assert "url(" not in style
    assert "@import" not in style
    assert "<h2>&lt;load&gt; &amp; more</h2>" in text
    for item in done.policies:
        assert f"<td>{item.result.policy}</td><td>{item.result.balancedness:.4f}</td>" in text


def console_of(path, folder):
    """What Chromium writes to the console while it shows the page."""
    quiet = ("background-networking", "component-update", "gpu", "quic", "sync")
    flags = ["--headless", "--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in quiet)]
    flags += ["--enable-logging=stderr", "--virtual-time-budget=2000"]
    run = subprocess.run(
        [CHROMIUM, *flags, f"--user-data-dir={folder}", "--dump-dom", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "</html>" in run.stdout
    return [line for line in run.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_the_console_stays_quiet(page, tmp_path):
    assert console_of(page, tmp_path / "profile") == []
    # The same eyes do see a page that complains.
    loud = tmp_path / "loud.html"
    loud.write_text("<html><img src='missing.png'><script>console.error('oh no')</script></html>")
    assert any("oh no" in line for line in console_of(loud, tmp_path / "profile"))


def run(*args):
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_the_command_writes_the_page_and_pictures(tmp_path, trace):
    save_load_trace(tmp_path / "load.npz", trace)
    shape = ["--ranks", 4, "--slots", 36, "--policy", "static", "--policy", "adaptive"]
    out = tmp_path / "out.html"
    result = run("report", tmp_path / "load.npz", "-o", out, "--png", tmp_path / "png", *shape)
    assert result.exit_code == 0, result.output
    # 36 steps leave eight intervals of four.
    assert "rebalanced every 4 steps" in out.read_text()
    keys = ["policies", "rank_loads", "balancedness", "dispatch", "moves", "hottest_experts"]
    assert sorted(path.stem for path in (tmp_path / "png").iterdir()) == sorted(keys)
    assert "assumed to take 20 &micro;s" in out.read_text()
    more = ["--expert-cost", 24, "--message-us", 7]
    result = run("report", tmp_path / "load.npz", "-o", out, *shape, *more)
    assert result.exit_code == 0, result.output
    assert "at an expert cost of 24 tokens. Its message, assumed to take 7 &micro;s" in out.read_text()
    result = run("report", tmp_path / "load.npz", "-o", out, *shape, "--tokens", "replicated")
    assert "It needs no message" in out.read_text()
    result = run("report", tmp_path / "load.npz", tmp_path / "load.npz", "-o", out, "--interval", 9, *shape)
    assert result.exit_code == 0, result.output
    text = out.read_text()
    assert text.count("rebalanced every 9 steps") == 2
    assert text.count("<img") == 12


def test_without_matplotlib_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(EplbError, match=r"pip install 'eplb-plugin\[report\]'"):
        run("report", "gpt-oss-20b", "-o", tmp_path / "out.html")
    assert not list(tmp_path.iterdir())


def test_wrong_policies_and_places_are_told(tmp_path, done):
    with pytest.raises(ConfigError, match="no policy 'best'"):
        run("report", "gpt-oss-20b", "-o", tmp_path / "out.html", "--policy", "best")
    with pytest.raises(TraceError, match="cannot be written"):
        write_page(tmp_path / "no folder" / "out.html", [(done, [])])
