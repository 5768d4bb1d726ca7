"""`eplb-plugin doctor`: versions, engines by their metadata, a self-test, and the options in force."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, entry_points, packages_distributions, version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from ..config.options import PlannerOptions
from ..config.sources import CONFIG_VARIABLE, Settings, allowed_plugins, load_settings
from ..core.balancedness import balancedness, peak_rank_loads
from ..core.errors import ConfigError
from ..core.placement import Placement
from ..core.topology import Topology
from ..integration.adapters import Adapter, adapters
from ..offline.synthetic_traffic import generate
from ..planning.planner import plan
from .console import compiling

__all__ = ["EngineState", "SelfTest", "doctor", "engine_states", "package_versions", "self_test"]

_ALWAYS_SHOWN = ("planner", "rebalancer")
_TOPOLOGY = Topology(num_nodes=2, num_ranks=8, num_slots=40, num_groups=4)
_LAYERS = 8
_PLUGIN = "eplb_plugin"
_PACKAGES = ("eplb-plugin", "torch", "numba", "numpy", "scipy", "matplotlib")


@dataclass(frozen=True)
class _Option:
    value: Any
    origin: str


def doctor(
    config: Annotated[Path | None, typer.Option(help="YAML file with options.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON instead.")] = False,
) -> None:
    """Check the installation: versions, engines, a self-test, and every option with where it comes from.

    Exit code 1 means a problem, which the last lines name.
    """
    settings = load_settings(config)
    with compiling(Console(stderr=True), "testing"):
        versions, engines = package_versions(), engine_states(config)
        tested = self_test(settings.planner)
    options = _options(settings)
    file = config or f"the file of {CONFIG_VARIABLE}"
    for engine in engines:  # commands ignore these
        for name, value in engine.options.items():
            options[name] = _Option(value, f"{file}, for {engine.name}")
    problems = [*tested.problems, *(line for engine in engines for line in engine.problems)]
    if as_json:
        content = {
            "python": platform.python_version(),
            "packages": versions,
            "engines": [asdict(engine) for engine in engines],
            "policy": settings.planner.policy,
            "self_test": asdict(tested),
            "options": {name: asdict(option) for name, option in options.items()},
            "problems": problems,
        }
        print(json.dumps(content))
    else:
        _show(versions, engines, settings.planner.policy, tested, options)
        for line in problems:
            Console().print(f"problem: {line}", style="bold red", highlight=False, soft_wrap=True)
        if not problems:
            print("no problems found")
    if problems:
        raise typer.Exit(1)


def _show(
    versions: dict[str, str | None],
    engines: list[EngineState],
    policy: str,
    tested: SelfTest,
    options: dict[str, _Option],
) -> None:
    console = Console()
    rows = [("Python", f"{platform.python_version()} on {platform.platform()}")]
    rows += [(name, number or "not installed") for name, number in versions.items()]
    rows.append(("accelerator", torch.cuda.get_device_name() if torch.cuda.is_available() else "none"))
    console.print(_table("Installed", rows))
    rows = []
    for engine in engines:
        rows.append((engine.name, engine.version or "not installed"))
        if engine.version:
            rows.append(("", f"plugin: {engine.plugin}"))
    console.print(_table("Engines", rows))
    passed = "failed" if tested.problems else "passed"
    gain = f"balancedness {tested.before:.3f} to {tested.after:.3f}"
    times = f"{tested.plan_ms:.1f} ms a plan; first plans, which load the planner, {tested.first_ms:.0f} ms"
    rows = [("policy", policy), ("self-test", f"{passed}: {gain}"), ("time", times)]
    console.print(_table("Planning", rows))
    table = Table(title="Options in force", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("option", no_wrap=True)
    for name in ("value", "from"):
        table.add_column(name, overflow="fold")
    for name, option in options.items():
        style = None if option.origin == "default" else "bold"
        table.add_row(name, json.dumps(option.value), option.origin, style=style)
    console.print(table)
    for engine in engines:
        for line in engine.notes:
            console.print(f"note: {line}", style="yellow", highlight=False, soft_wrap=True)


def _table(title: str, rows: list[tuple[str, str]]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _options(settings: Settings) -> dict[str, _Option]:
    """All options of the planner and of the online loop, and options of commands where they are set."""
    found = {}
    for section, options in settings.model_dump(mode="json").items():
        for option, value in options.items():
            name = f"{section}.{option}"
            origin = settings.origins.get(name, "default")
            if section in _ALWAYS_SHOWN or origin != "default":
                found[name] = _Option(value, origin)
    return found


@dataclass(frozen=True)
class SelfTest:
    """Result of the self-test.

    Attributes:
        first_ms: time of the first plans in milliseconds, with compiling or loading of the kernels.
        plan_ms: time of a later plan in milliseconds.
        before: balancedness of the default placement, with which engines start.
        after: balancedness of the plan.
        problems: one line for each.
    """

    first_ms: float
    plan_ms: float
    before: float
    after: float
    problems: tuple[str, ...]


def self_test(options: PlannerOptions) -> SelfTest:
    """Plan for a small load from scratch and from the placement in force, and check the plans."""
    load = generate("gpt-oss-20b", layers=_LAYERS, steps=16, tokens_per_step=256).load
    default = Placement.default(_LAYERS, load.shape[2], _TOPOLOGY.num_slots)
    began = time.perf_counter()
    plan(load, _TOPOLOGY, None, options)
    plan(load, _TOPOLOGY, default, options)
    first_ms = 1000 * (time.perf_counter() - began)

    scratch = plan(load, _TOPOLOGY, None, options)
    grown = plan(load, _TOPOLOGY, default, options)
    before = balancedness(load, default, _TOPOLOGY)
    problems = []
    for name, made in (("from scratch", scratch), ("from the placement in force", grown)):
        made.placement.validate(_TOPOLOGY)
        after = balancedness(load, made.placement, _TOPOLOGY)
        if abs(after - made.balancedness) > 1e-9:
            problems.append(f"plan {name}: promises a balancedness of {made.balancedness}, but has {after}")
        if after < before:
            problems.append(f"plan {name}: balancedness {after:.4f} is worse than {before:.4f} without one")
        peak = peak_rank_loads(load, made.placement, _TOPOLOGY).mean(0)
        if bool((peak < made.lower_bound * (1 - 1e-9)).any()):
            problems.append(f"plan {name}: its peak is below the lower bound")
    again = plan(load, _TOPOLOGY, default, options)
    if not torch.equal(again.placement.physical_to_logical, grown.placement.physical_to_logical):
        problems.append("the same load gave two different plans")
    return SelfTest(first_ms, 1000 * grown.seconds, before, grown.balancedness, tuple(problems))


@dataclass(frozen=True)
class EngineState:
    """One engine.

    Attributes:
        name: as people write it.
        version: of the installed package, with the package's name where that differs; None if absent.
        plugin: whether it would load the plugin, and how to enable it.
        problems: obstacles, one line for each.
        notes: remarks that are no obstacle, one line for each.
        options: options in the file for this engine alone, by `section.option`, as they were understood.
    """

    name: str
    version: str | None
    plugin: str
    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


def package_versions() -> dict[str, str | None]:
    """Versions of the packages for planning and reports; None where a package is absent."""
    found: dict[str, str | None] = dict.fromkeys(_PACKAGES)
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def engine_states(config: Path | None = None) -> list[EngineState]:
    """State of each engine by its metadata, the environment and the configuration file.

    Args:
        config: the file; None is the file in EPLB_PLUGIN_CONFIG, which engines read.

    Raises:
        ConfigError, TraceError: the file cannot be read.
    """
    return [_state(adapter, config) for adapter in adapters()]


def _state(adapter: Adapter, config: Path | None) -> EngineState:
    installed, problems, notes = _installed(adapter.package), [], []
    plugin, options = adapter.how_to_enable, {}
    try:
        found = adapter.in_file(config)
        options = dict(found.options)
        if found.enabled_by is not None:
            plugin = f"on by {found.enabled_by}"
    except ConfigError as error:
        problems.append(str(error))
    if installed is not None:
        problems += _obstacles(adapter)
        untested = adapter.untested(installed.partition(" ")[0])
        notes += [untested] if untested else []
    return EngineState(adapter.name, installed, plugin, tuple(problems), tuple(notes), options)


def _installed(module: str) -> str | None:
    """`1.2.0`, or `1.2.0 (NAME)` where the package has another name than the module; None if absent."""
    for name in sorted(set(packages_distributions().get(module, []))):
        return version(name) if name == module else f"{version(name)} ({name})"
    return None


def _obstacles(adapter: Adapter) -> list[str]:
    """Reasons why the engine would not load the plugin."""
    ours = [item for item in entry_points(group=adapter.entry_points) if item.name == _PLUGIN]
    if not ours:
        return [
            f"{adapter.name} cannot find the plugin: no entry point {_PLUGIN} in the group "
            f"{adapter.entry_points}"
        ]
    problems = []
    module = ours[0].value.partition(":")[0]
    there = False
    with suppress(ModuleNotFoundError):
        there = find_spec(module) is not None
    if not there:
        problems.append(f"{adapter.name} would look for the plugin in {module}, which is not there")
    variable = adapter.allowed_plugins
    allowed = allowed_plugins(variable, empty_is_all=adapter.empty_allows_all)
    if allowed is not None and _PLUGIN not in allowed:
        problems.append(f"{variable}={','.join(allowed)} keeps {adapter.name} from loading {_PLUGIN}")
    return problems
