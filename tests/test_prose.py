"""The prose of the documentation: sentences are short on the mean, and none is long."""

from __future__ import annotations

import re
from pathlib import Path
from statistics import mean

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    *(
        ROOT / "docs" / f"{name}.md"
        for name in ("algorithm", "architecture", "dispatch", "performance", "reliability")
    ),
]
MOST_ON_THE_MEAN = 18  # words
MOST = 35  # words

_ABBREVIATIONS = {"e.g", "i.e", "etc", "vs", "cf", "fig", "eq", "sec", "approx", "al", "resp"}
# Wherever one of these stands, a sentence may end; whether it does depends on what precedes it.
_END = re.compile(r"[.!?][\"')\]]*(?=\s)")
_LIST_ITEM = re.compile(r"^\s*(?:[-*+]|\d+[.)])\s+")


def paragraphs(markdown: str) -> list[str]:
    """The paragraphs and list items of a page, each on one line, without Markdown's marks.

    Code blocks, tables, headings, images and HTML are left out. Inline code counts as one word.
    """
    text = re.sub(r"<!--.*?-->", "", markdown, flags=re.DOTALL)
    text = re.sub(r"^( *)(```|~~~).*?^ *\2 *$", "", text, flags=re.MULTILINE | re.DOTALL)
    found: list[list[str]] = [[]]
    in_list = after_blank = False
    for line in text.splitlines():
        if not line.strip():
            found.append([])
            after_blank = True
            continue
        if item := _LIST_ITEM.match(line):
            found.append([line[item.end() :]])
            in_list = True
        elif after_blank and line.startswith("    ") and not in_list:
            continue  # an indented block of code; the next lines of it are after a blank line as well
        elif line.lstrip().startswith(("|", "#")):
            found.append([])
            in_list = False
        else:
            in_list = in_list and (line.startswith(" ") or not after_blank)
            found[-1].append(line)
        after_blank = False
    plain = (_plain(" ".join(lines)) for lines in found)
    return [paragraph for paragraph in plain if paragraph]


def _plain(text: str) -> str:
    text = re.sub(r"(`+).+?\1", "Code", text)
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"</?[A-Za-z][^>]*>", "", text)
    text = re.sub(r"\*\*|__|(?<!\w)[*_]|[*_](?!\w)", "", text)
    return " ".join(text.split())


def sentences(paragraph: str) -> list[str]:
    """The sentences of one paragraph."""
    found, begin = [], 0
    for end in _END.finditer(paragraph):
        word = paragraph[begin : end.start()].rpartition(" ")[2].lstrip("([\"'")
        initial = len(word) == 1 and word.isupper()
        ellipsis = paragraph[: end.start() + 1].endswith("..")
        if initial or ellipsis or word.lower() in _ABBREVIATIONS:
            continue
        found.append(paragraph[begin : end.end()])
        begin = end.end() + 1
    return [sentence for sentence in (*found, paragraph[begin:]) if words(sentence)]


def words(sentence: str) -> int:
    """Words and numbers; a dash or a sign between blanks is none."""
    return sum(any(letter.isalnum() for letter in word) for word in sentence.split())


def prose(markdown: str) -> list[str]:
    """All sentences of a page but labels, which have one or two words and would only lower the mean."""
    found = (sentence for paragraph in paragraphs(markdown) for sentence in sentences(paragraph))
    return [sentence for sentence in found if words(sentence) > 2]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_sentences_are_short(page):
    found = prose(page.read_text(encoding="utf-8"))
    assert len(found) > 10, "there is next to no prose to measure"
    too_long = [f"{words(sentence)} words: {sentence}" for sentence in found if words(sentence) > MOST]
    assert not too_long, "\n".join(too_long)
    average = mean(words(sentence) for sentence in found)
    assert average <= MOST_ON_THE_MEAN, f"{average:.1f} words on the mean"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It moves. It checks.", ["It moves.", "It checks."]),
        ("It rises by 0.5 points. Then it falls.", ["It rises by 0.5 points.", "Then it falls."]),
        ("See planning/planner.py for it. Then go on.", ["See planning/planner.py for it.", "Then go on."]),
        ("Some, e.g. the first, wait. Others do not.", ["Some, e.g. the first, wait.", "Others do not."]),
        ("(It waits.) It goes on.", ["(It waits.)", "It goes on."]),
        ("Does it wait? It does! And then?", ["Does it wait?", "It does!", "And then?"]),
        ("By J. L. W. V. Jensen and others. In 1906.", ["By J. L. W. V. Jensen and others.", "In 1906."]),
        ("By DeepSeek et al. in 2025. Later.", ["By DeepSeek et al. in 2025.", "Later."]),
        ("Numbers 0, 1, ... count. They do.", ["Numbers 0, 1, ... count.", "They do."]),
        # A sentence may begin with a name in lower case.
        ("It plans. vLLM moves.", ["It plans.", "vLLM moves."]),
        ("It plans (in 0.1 s). So it is.", ["It plans (in 0.1 s).", "So it is."]),
        ("It says \"no.\" It goes on.", ['It says "no."', "It goes on."]),
        # Neither a semicolon nor a colon ends one: they would hide any length.
        ("It plans; it moves: all of it", ["It plans; it moves: all of it"]),
        ("It takes 3 ms on version 2.1. No more.", ["It takes 3 ms on version 2.1.", "No more."]),
    ],
)  # fmt: skip
def test_sentences_end_where_they_end(text, expected):
    assert sentences(text) == expected


@pytest.mark.parametrize(
    ("markdown", "expected"),
    [
        ("# A heading. Of two\n\nText.\n", ["Text."]),
        ("One line\nand the next.\n\nAnother.", ["One line and the next.", "Another."]),
        ("Before:\n\n```\ncode. More code.\n```\nAfter.", ["Before:", "After."]),
        ("Before.\n\n    code here. More.\n    and more.\n\nAfter.", ["Before.", "After."]),
        ("| a. b | c |\n|---|---|\n| d | e |\nText.", ["Text."]),
        ("- one\n  goes on\n- two\n", ["one goes on", "two"]),
        ("- one\n\n    its second paragraph\n", ["one", "its second paragraph"]),
        ("1. first\n2. second. It goes on.\n", ["first", "second. It goes on."]),
        ("<!-- not this. -->\nText <b>bold</b>.", ["Text bold."]),
        ("![a picture. Of it](x.svg)\n\nText.", ["Text."]),
        ("See [this page](a.md#b). `f(x). y` is *code*, **bold** and snake_case.",
         ["See this page. Code is code, bold and snake_case."]),
    ],
)  # fmt: skip
def test_paragraphs_leave_out_what_is_no_prose(markdown, expected):
    assert paragraphs(markdown) == expected


def test_words_are_counted():
    assert words("It takes 3.5 ms - or 4 + 1 in `plan`, load / count.") == 11
    assert words("--") == 0


def test_long_sentences_are_found_wherever_they_are():
    long = " ".join(["word"] * 40)
    for page in (f"{long}.", f"Short. {long}", f"- {long}\n- short\n", f"1. Short one. {long}.\n"):
        assert max(words(sentence) for sentence in prose(page)) == 40
    # Labels do not make up for it.
    assert [words(sentence) for sentence in prose(f"**plan.** {long}.")] == [40]
