"""The documentation: its links lead somewhere, and the commands and options that it names exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer

from eplb_plugin.cli import app
from eplb_plugin.config.options import AUTO_MOVE_PRICE, PlannerOptions, RebalancerOptions

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


def code(page: Path) -> str:
    """All that is set as code, blocks and words."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```.*?^```", text, re.MULTILINE | re.DOTALL)
    # A command goes on after a backslash.
    return "\n".join([*blocks, *re.findall(r"`([^`\n]+)`", text)]).replace("\\\n", " ")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = LINK.findall(page.read_text(encoding="utf-8"))
    for link in links:
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def test_every_page_is_reached_from_the_guide():
    linked = {
        link.partition("#")[0] for link in LINK.findall((ROOT / "docs" / "guide.md").read_text("utf-8"))
    }
    assert {page.name for page in PAGES[1:]} - {"guide.md"} <= linked
    assert "docs/guide.md" in LINK.findall(PAGES[0].read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_their_options_exist(page):
    commands = typer.main.get_command(app).commands
    for name, rest in re.findall(r"\beplb-plugin (?!is active)([a-z]+)\b([^\n|]*)", code(page)):
        assert name in commands, name
        known = {option for parameter in commands[name].params for option in parameter.opts}
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", rest)) <= known | {"--help"}, f"{name}{rest}"


def test_the_settings_of_the_guide_exist_with_the_defaults_that_it_compares_with():
    text = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    for name in re.findall(r"`(?:planner|rebalancer)\.(\w+)`", text):
        assert name in PlannerOptions.model_fields or name in RebalancerOptions.model_fields, name
    (history, price) = re.findall(r"\*\*72 slots, interval 512, history (\d+), price ([\d.]+)\*\*", text)[0]
    assert int(history) == RebalancerOptions().history
    assert float(price) == AUTO_MOVE_PRICE


def test_the_architecture_lists_every_module_once():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    listed = []
    for section in text.partition("files: begin")[2].partition("files: end")[0].split("\n### ")[1:]:
        folder, _, rows = section.partition("\n")
        listed += [folder + name for name in re.findall(r"^\| `([^`]+\.py)`", rows, re.MULTILINE)]
    modules = [
        path.relative_to(ROOT).as_posix()
        for folder in ("eplb_plugin", "integration")
        for path in (ROOT / folder).rglob("*.py")
        if path.name != "__init__.py"
    ]
    assert sorted(listed) == sorted(modules)
