"""The package as a whole: who may import whom, what importing it does, and that the wheel works."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "eplb_plugin"

# Layers from the bottom up: a module imports from its own layer and from those above it in this list.
LAYERS = (
    "core",
    "config",
    "dispatch",
    "planning",
    "offline",
    "formats",
    "runtime",
    "observability",
    "advisor",
    "report",
    "integration",
    "cli",
)
ENGINES = {"vllm", "sglang"}
READ_ENVIRONMENT = {"sources.py", "ranks.py", "transport.py"}
MOST_LINES, FEWEST_LINES, MOST_FILES, MOST_FILES_OF_RUNTIME = 350, 20, 187, 16


def imported_modules(path: Path, package: str) -> list[str]:
    """Absolute names of everything a file imports, relative imports resolved."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            names.append(".".join([*base, *([node.module] if node.module else [])]))
            names += [f"{names[-1]}.{alias.name}" for alias in node.names]
    return names


def module_files() -> dict[str, Path]:
    """Every module of the package and of the adapters, by its absolute name."""
    found = {}
    for top, name in ((PACKAGE, "eplb_plugin"), (ROOT / "integration", "eplb_plugin.integration")):
        for path in sorted(top.rglob("*.py")):
            parts = path.relative_to(top).with_suffix("").parts
            found[".".join([name, *(part for part in parts if part != "__init__")])] = path
    return found


MODULES = module_files()
in_each_module = pytest.mark.parametrize("module", [name for name in MODULES if name != "eplb_plugin"])


def package_of(module: str) -> str:
    return module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]


@in_each_module
def test_modules_import_from_lower_layers_only(module):
    path = MODULES[module]
    own = module.split(".")[1]
    assert own in LAYERS, f"{path} is in no layer"
    for name in imported_modules(path, package_of(module)):
        parts = name.split(".")
        if parts[0] == "eplb_plugin" and len(parts) > 1 and parts[1] in LAYERS:
            assert LAYERS.index(parts[1]) <= LAYERS.index(own), f"{path}: {name}"
        if parts[:2] == ["torch", "distributed"]:
            assert own in {"runtime", "integration", "cli"}, f"{path} uses {name}"
        if parts[0] in ENGINES:
            assert own == "integration", f"{path} uses {name}"
        assert parts[0] != "integration", f"{path} imports the adapters by the wrong name"
        assert name not in {"os.environ", "os.getenv"}, f"{path} reads the environment"


def test_no_import_circles():
    """Also not through imports within functions: those are for heavy libraries."""
    arrows = {
        module: {name for name in imported_modules(path, package_of(module)) if name in MODULES} - {module}
        for module, path in MODULES.items()
    }
    # A package is imported with each of its modules; what its __init__ imports from them is no circle.
    arrows = {
        module: {name for name in names if not module.startswith(f"{name}.")}
        for module, names in arrows.items()
    }
    left = dict(arrows)
    while free := [module for module, names in left.items() if not names & left.keys()]:
        for module in free:
            del left[module]
    assert not left, f"import circles among {sorted(left)}"


def test_files_are_neither_tiny_nor_huge():
    """One concept each: at most 350 lines, and more than one loop or one constant."""
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES.values()}
    assert not {str(path): n for path, n in lines.items() if n > MOST_LINES}
    small = {str(p): n for p, n in lines.items() if n < FEWEST_LINES and p.name != "__init__.py"}
    assert not small
    assert len(lines) <= MOST_FILES
    assert len(list((PACKAGE / "runtime").glob("*.py"))) <= MOST_FILES_OF_RUNTIME


def test_file_names_are_made_of_the_words_of_the_field():
    """A new word is added to `words.txt` on purpose, or not at all."""
    known = set((ROOT / "tests" / "words.txt").read_text(encoding="utf-8").split())
    used = {
        word
        for path in MODULES.values()
        for part in path.relative_to(ROOT).with_suffix("").parts
        for word in part.strip("_").split("_")
    }
    assert used <= known, f"not words of the field: {sorted(used - known)}"
    assert known <= used, f"no file has them any more: {sorted(known - used)}"


@in_each_module
def test_only_the_sources_of_options_read_the_environment(module):
    """The processes that the demo starts may also be told there which network interface to use, and torch how
    to make a group."""
    path = MODULES[module]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and node.attr in {"environ", "getenv"}:
            assert path.name in READ_ENVIRONMENT, f"{path}:{node.lineno}"


def test_importing_the_package_is_quiet():
    code = (
        "import sys, threading\n"
        "import torch\n"
        "threads = threading.active_count()\n"
        "import eplb_plugin\n"
        "assert threading.active_count() == threads\n"
        "heavy = {'vllm', 'sglang', 'matplotlib', 'numba', 'scipy', 'typer', 'rich', 'yaml', 'triton'}\n"
        "heavy.add('prometheus_client')\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "missing = [name for name in eplb_plugin.__all__ if not hasattr(eplb_plugin, name)]\n"
        "assert not missing, missing\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd="/", timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == result.stderr == ""


def test_the_wheel_installs_and_imports(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("eplb_plugin", "integration", "configs"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]

    def run(command, **more):
        return subprocess.run(command, check=True, timeout=240, capture_output=True, text=True, **more)

    run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, source])
    (wheel,) = tmp_path.glob("*.whl")
    clean = tmp_path / "clean"
    run([sys.executable, "-m", "venv", "--without-pip", clean])
    python = clean / "bin" / "python"
    run([*pip, "--python", python, "install", "--no-deps", wheel])
    # The dependencies come from the environment of the tests, the package from the wheel alone.
    (site,) = clean.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(str(Path(torch.__file__).parents[1]) + "\n")
    code = (
        "import eplb_plugin, eplb_plugin.integration, importlib, pkgutil, torch\n"
        "for module in pkgutil.walk_packages(eplb_plugin.__path__, 'eplb_plugin.'):\n"
        "    if not module.name.startswith('eplb_plugin.integration.') and '__main__' not in module.name:\n"
        "        importlib.import_module(module.name)\n"
        "assert importlib.util.find_spec('integration') is None\n"
        "topology = eplb_plugin.Topology(num_ranks=2, num_slots=6)\n"
        # Compiling, of which nothing is kept here, would take longer than all the rest.
        "options = eplb_plugin.PlannerOptions(policy='greedy')\n"
        "plan = eplb_plugin.plan(torch.ones(1, 4), topology, options=options)\n"
        "print(eplb_plugin.__file__, plan.balancedness)\n"
    )
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    result = run([python, "-c", code], cwd="/", env=env)
    assert str(clean) in result.stdout
    assert (site / "eplb_plugin" / "py.typed").exists()
    assert not (site / "integration").exists()
    assert {path.name for path in (site / "eplb_plugin" / "configs").iterdir()} == {
        path.name for path in (ROOT / "configs").iterdir()
    }
