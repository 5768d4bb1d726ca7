"""Compiled kernels on disk: another process loads them, and a change of any of their files is noticed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import eplb_plugin as eplb
from eplb_plugin.planning import forecast_kernels, table_kernels
from eplb_plugin.planning.kernels import compiling, plan_layers

FOLDER = Path(compiling.__file__).parent

# An entrance as that of the kernels, and a function in another file that it has compiled in.
ENTRANCE = """
from .compiling import SOURCES, compile_entrance
from .helper import answer

def _entrance(sources):
    @compile_entrance
    def enter():
        _ = sources
        return answer()

    return enter

enter = _entrance(SOURCES)
"""
HELPER = """
from .compiling import _compile

@_compile
def answer():
    return {answer}
"""
CALL = """
from package.entrance import enter
print(enter(), sum(enter.stats.cache_hits.values()), sum(enter.stats.cache_misses.values()))
"""
WARMED = """
import eplb_plugin as eplb
from eplb_plugin.planning import forecast_kernels, table_kernels
from eplb_plugin.planning.kernels import plan_layers
eplb.warmup()
passes = [getattr(module, name) for module in (forecast_kernels, table_kernels) for name in module.__all__]
entrances = [plan_layers, *passes]
print([(len(entrance.stats.cache_hits), len(entrance.stats.cache_misses)) for entrance in entrances])
"""


def printed(code: str, folder: Path) -> str:
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_a_change_in_another_file_is_compiled_anew(tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").touch()
    shutil.copy(FOLDER / "compiling.py", package)
    (package / "entrance.py").write_text(ENTRANCE)
    (package / "helper.py").write_text(HELPER.format(answer=1))
    assert printed(CALL, tmp_path) == "1 0 1"
    assert printed(CALL, tmp_path) == "1 1 0"
    (package / "helper.py").write_text(HELPER.format(answer=2))
    assert printed(CALL, tmp_path) == "2 0 1"
    (package / "helper.py").write_text(HELPER.format(answer=1))
    assert printed(CALL, tmp_path) == "1 1 0"


def test_the_digest_covers_every_file_of_the_kernels(tmp_path):
    package = tmp_path / "package"
    shutil.copytree(FOLDER, package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "__init__.py").write_text("")
    files = sorted(file.name for file in package.glob("*.py"))
    code = (
        "from pathlib import Path\n"
        "from package.compiling import _digest_of_sources as digest\n"
        "digests = {digest()}\n"
        f"for name in {files}:\n"
        "    with Path('package', name).open('a') as file:\n"
        "        file.write('#')\n"
        "    digests.add(digest())\n"
        "print(len(digests))\n"
    )
    assert printed(code, tmp_path) == str(1 + len(files))


def test_the_entrance_closes_over_the_digest():
    (cell,) = plan_layers.py_func.__closure__
    assert cell.cell_contents == compiling.SOURCES == compiling._digest_of_sources()


def test_another_process_compiles_nothing(tmp_path):
    eplb.warmup()
    passes = [*forecast_kernels.__all__, *table_kernels.__all__]
    assert printed(WARMED, tmp_path) == str([(1, 0)] * (1 + len(passes)))
