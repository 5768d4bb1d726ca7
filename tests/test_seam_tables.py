"""Tables of seams: the reader of wheels on small sources, the check at start, and what the adapters call."""

from __future__ import annotations

import inspect
import sys
import textwrap
import zipfile

import pytest

from eplb_plugin.integration.adapters import ENGINES, adapters
from eplb_plugin.integration.common.seams import Seam, missing_here
from eplb_plugin.integration.sglang import seam_table as sglang_table
from eplb_plugin.integration.vllm import seam_table as vllm_table
from eplb_plugin.integration.vllm.dispatch import BalancedMapping
from eplb_plugin.integration.vllm.policy import VllmPolicy

from .wheels.sources import Wheel

SOURCES = {
    "madeup/__init__.py": "from .parts import Base as Renamed\n",
    "madeup/parts/__init__.py": """
        from ..other import helper
        from .inner import Base
        if True:
            LIMIT: int = 3
        else:
            LIMIT = 4
    """,
    "madeup/parts/inner.py": """
        from dataclasses import dataclass

        class Base:
            shared: int

            def __init__(self, size, *, flag=False):
                self.size = size

            @classmethod
            def make(cls, a, /, b, *rest, c=1, **more):
                return cls(a)

        class Child(Base):
            fixed = 1

            async def run(self, x):
                self.later, self.also = x, x

            def reads(self):
                return self.only_read

        @dataclass
        class Row:
            one: int
            two: int = 2
    """,
    "madeup/other.py": """
        try:
            from nowhere import helper
        except ImportError:
            def helper(value): ...
    """,
}
PRESENT = (
    Seam("madeup.Renamed"),
    Seam("madeup.parts.Base", ("size", "flag"), exactly=True),
    Seam("madeup.parts.LIMIT"),
    Seam("madeup.parts.inner.Base.shared"),
    Seam("madeup.parts.inner.Base.size"),
    Seam("madeup.parts.inner.Base.make", ("a", "b", "c", "rest", "more"), exactly=True),
    Seam("madeup.parts.inner.Child.make", ("b",)),
    Seam("madeup.parts.inner.Child.fixed"),
    Seam("madeup.parts.inner.Child.run", ("self", "x")),
    Seam("madeup.parts.inner.Child.also"),
    Seam("madeup.parts.inner.Row", ("one", "two"), exactly=True),
    Seam("madeup.parts.inner.Row.one"),
    Seam("madeup.other.helper", ("value",)),
)
ABSENT = {
    Seam("madeup.Base"): "is missing",
    Seam("madeup.parts.Base", ("width",)): "has no argument 'width'",
    Seam("madeup.parts.Base", ("size",), exactly=True): "takes (size, flag), not (size)",
    Seam("madeup.parts.none"): "is missing",
    Seam("madeup.parts.inner.Base.color"): "is missing",
    Seam("madeup.parts.inner.Child.only_read"): "is missing",
    Seam("madeup.parts.inner.Child.run", ("y",)): "has no argument 'y'",
    Seam("madeup.parts.inner.Row", ("three",)): "has no argument 'three'",
    Seam("madeup.parts.inner.none.make"): "is missing",
    Seam("madeup.nowhere.x"): "is missing",
    Seam("elsewhere.x"): "is missing",
}


@pytest.fixture
def wheel(tmp_path):
    path = tmp_path / "madeup-1.2.3-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in SOURCES.items():
            archive.writestr(name, textwrap.dedent(text))
    return Wheel(path)


@pytest.fixture
def importable(tmp_path, monkeypatch):
    for name, text in SOURCES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "madeup"]:
        del sys.modules[name]


def test_a_wheel_has_what_it_has(wheel):
    assert wheel.version == "1.2.3"
    assert wheel.missing(PRESENT) == []
    for seam, told in ABSENT.items():
        (line,) = wheel.missing((seam,))
        assert line == f"{seam.target} {told}"


def test_a_running_engine_has_the_same(importable):
    assert missing_here(PRESENT) == []
    for seam, told in ABSENT.items():
        (line,) = missing_here((seam,))
        assert line.startswith(f"{seam.target} {told}")


def test_reading_a_wheel_imports_nothing(wheel):
    wheel.missing(PRESENT)
    assert "madeup" not in sys.modules


def parameters(function):
    return [name for name in inspect.signature(function).parameters if name != "self"]


def test_the_tables_have_what_the_adapters_take_from_the_engines():
    by_name = {seam.target.rpartition(".")[2]: seam for seam in vllm_table.SEAMS if seam.exactly}
    assert set(by_name) == {"rebalance_experts", "eplb_map_to_physical_and_record"}
    assert list(by_name["rebalance_experts"].arguments) == parameters(VllmPolicy.rebalance_experts)
    mapping = by_name["eplb_map_to_physical_and_record"]
    assert list(mapping.arguments) == parameters(BalancedMapping.__call__)


@pytest.mark.parametrize(("table", "engine"), [(vllm_table, "vllm"), (sglang_table, "sglang")])
def test_the_tables_name_each_seam_once(table, engine):
    targets = [seam.target for seam in table.SEAMS]
    assert len(targets) == len(set(targets)) > 20
    assert all(target.startswith(f"{engine}.") for target in targets)


def test_a_release_that_was_checked_by_signature_says_so():
    adapter = dict(zip(ENGINES, adapters(), strict=True))["vllm"]
    assert adapter.untested("0.32.1") is None
    assert adapter.untested("0.33.0") == (
        "eplb_plugin was tested with vLLM 0.32; of 0.33.0, the signatures of what it uses were checked"
    )
    assert adapter.untested("0.34.0") == "eplb_plugin was tested with vLLM 0.32, not 0.34.0"
