"""Compiled kernels on disk: another process loads them, a change of any of their files is noticed, and they
work where no folder can be written to."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import eplb_plugin as eplb
from eplb_plugin.core import jit
from eplb_plugin.planning.kernels import compiling, forecast, placement_tables
from eplb_plugin.planning.kernels.plan_layers import plan_layers

FOLDER = Path(compiling.__file__).parent

# An entry point as those of the kernels, and a function of another file that is compiled into it.
ENTRY_POINT = """
from .compiling import SOURCES, entry_point
from .helper import answer

def _build(sources):
    @entry_point
    def enter():
        _ = sources
        return answer()

    return enter

enter = _build(SOURCES)
"""
HELPER = """
from .compiling import jitable

@jitable
def answer():
    return {answer}
"""
CALL = """
from tree.planning.package.entry import enter
print(enter(), sum(enter.stats.cache_hits.values()), sum(enter.stats.cache_misses.values()))
"""
CACHED = """
from .jit import cached_njit

@cached_njit(nogil=True)
def double(number):
    return 2 * number

@cached_njit(nogil=True)
def triple(number):
    return 3 * number
"""
WARMED = """
import eplb_plugin as eplb
from eplb_plugin.planning.kernels import forecast, placement_tables
from eplb_plugin.planning.kernels.plan_layers import plan_layers
eplb.warmup()
passes = [getattr(module, name) for module in (forecast, placement_tables) for name in module.__all__]
entry_points = [plan_layers, *passes]
print([(len(entry.stats.cache_hits), len(entry.stats.cache_misses)) for entry in entry_points])
"""


def printed(code: str, folder: Path) -> str:
    result = run(code, folder)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def run(code: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command, env = [sys.executable, "-c", code], os.environ | environment
    return subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, timeout=240, check=False
    )


def copy_jit(tree: Path) -> None:
    """`core/jit.py`, where modules of `planning/package` look for it."""
    (tree / "core").mkdir()
    shutil.copy(jit.__file__, tree / "core")


def test_a_change_in_another_file_is_compiled_anew(tmp_path):
    package = tmp_path / "tree" / "planning" / "package"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    copy_jit(tmp_path / "tree")
    shutil.copy(FOLDER / "compiling.py", package)
    (package / "entry.py").write_text(ENTRY_POINT)
    (package / "helper.py").write_text(HELPER.format(answer=1))
    assert printed(CALL, tmp_path) == "1 0 1"
    assert printed(CALL, tmp_path) == "1 1 0"
    (package / "helper.py").write_text(HELPER.format(answer=2))
    assert printed(CALL, tmp_path) == "2 0 1"
    (package / "helper.py").write_text(HELPER.format(answer=1))
    assert printed(CALL, tmp_path) == "1 1 0"


def test_the_digest_covers_every_file_of_the_kernels(tmp_path):
    package = tmp_path / "tree" / "planning" / "package"
    shutil.copytree(FOLDER, package, ignore=shutil.ignore_patterns("__pycache__"))
    copy_jit(tmp_path / "tree")
    (package / "__init__.py").write_text("")
    files = sorted(file.name for file in package.glob("*.py"))
    code = (
        "from pathlib import Path\n"
        "from tree.planning.package.compiling import _digest_of_sources as digest\n"
        "digests = {digest()}\n"
        f"for name in {files}:\n"
        "    with Path('tree', 'planning', 'package', name).open('a') as file:\n"
        "        file.write('#')\n"
        "    digests.add(digest())\n"
        "print(len(digests))\n"
    )
    assert printed(code, tmp_path) == str(1 + len(files))


def test_the_entry_point_closes_over_the_digest():
    (cell,) = plan_layers.py_func.__closure__
    assert cell.cell_contents == compiling.SOURCES == compiling._digest_of_sources()


def test_another_process_compiles_nothing(tmp_path):
    eplb.warmup()
    passes = [*forecast.__all__, *placement_tables.__all__]
    assert printed(WARMED, tmp_path) == str([(1, 0)] * (1 + len(passes)))


def test_without_a_folder_for_the_cache_functions_are_compiled_anew(tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    shutil.copy(jit.__file__, package)
    (package / "functions.py").write_text(CACHED)
    # Nobody, not even root, can make a folder there.
    for nothing in (package / "__pycache__", tmp_path / "home"):
        nothing.touch()
    places = {name: str(tmp_path / "home") for name in ("HOME", "XDG_CACHE_HOME", "IPYTHONDIR")}
    code = "from package.functions import double, triple; print(double(2), triple(2))"
    result = run(code, tmp_path, NUMBA_CACHE_DIR="", **places)
    assert (result.returncode, result.stdout.strip()) == (0, "4 6"), result.stderr
    assert result.stderr.count("NUMBA_CACHE_DIR") == 1
    found = run(code, tmp_path, NUMBA_CACHE_DIR=str(tmp_path / "cache"), **places)
    assert (found.returncode, found.stdout.strip(), found.stderr) == (0, "4 6", "")
    assert list(tmp_path.glob("cache/*/*.nbc"))


def test_there_is_one_way_to_a_cache():
    root = Path(eplb.__file__).parent
    assert [path.name for path in root.rglob("*.py") if "cache=True" in path.read_text()] == ["jit.py"]
