"""vLLM's entry point: vLLM calls `register` in each of its processes; it acts where the plugin is enabled."""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

from ...config.sources import CONFIG_VARIABLE, ENV_PREFIX, pass_on, read_section
from ...core.errors import ConfigError
from ...core.safe_files import read_yaml
from ..adapters import Adapter, InFile
from ..common.agreement import announce
from ..common.options import EngineOptions, options_in_settings
from ..common.telemetry import engine_telemetry
from .dispatch import restore_mapping
from .policy import VllmPolicy
from .seams import bind_policy, missing_seams
from .warnings import watch_load

__all__ = ["ADAPTER", "KEY", "VllmOptions", "register", "vllm_options"]

_logger = logging.getLogger(__name__)

KEY = "eplb_plugin"
"""Section of the plugin's options in vLLM's `additional_config` and in the configuration file."""

_WRAPPED = "_eplb_plugin_wrapped"
_RAY_PREFIXES = "VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY"  # prefixes of the variables for workers on Ray
_active: list[VllmPolicy] = []  # of this process, the newest last
_warnings: Counter[str] = Counter()  # without a model that vLLM balances


class VllmOptions(EngineOptions):
    """The options under `eplb_plugin`."""

    enabled: bool = False
    """Whether vLLM plans with this plugin."""


def vllm_options(additional_config: object) -> VllmOptions:
    """The options that vLLM was started with.

    Options under `eplb_plugin` in its `additional_config`, or else in the file, go over the environment. The
    environment goes over the file's other sections.

    Raises:
        ConfigError: an unknown option or a wrong value.
    """
    source, values = "additional_config", None
    if isinstance(additional_config, Mapping):
        values = additional_config.get(KEY)
        for key in additional_config:
            if key != KEY and str(key).lower().replace("-", "_") == KEY:
                raise ConfigError(f"{source}: {key!r} is not known; the plugin's options are in {KEY!r}")
    if values is None:
        source, values = CONFIG_VARIABLE, read_section(KEY) or {}
    if not isinstance(values, Mapping):
        raise ConfigError(f"{source}: {KEY} is {values!r}, not options with values")
    settings = options_in_settings()
    planner = values.get("planner", {})
    if isinstance(planner, Mapping):
        planner = {**settings["planner"], **planner}
    try:
        return VllmOptions(**{**settings, **values, "planner": planner})
    except ConfigError as error:
        raise ConfigError(f"{source}: {KEY}: {error}") from None


def register() -> None:
    """Make vLLM's workers and its `EplbState` look for our options when they are made. A second call does
    nothing.

    Raises:
        ConfigError: the configuration file or a variable is wrong; the start of vLLM ends with that.
    """
    vllm_options(None)
    pass_on(ENV_PREFIX, _RAY_PREFIXES)
    try:
        from vllm.distributed.eplb.eplb_state import EplbState
        from vllm.v1.worker.worker_base import WorkerBase
    except ImportError as error:
        _share_log()
        _logger.error(
            "eplb_plugin cannot be enabled, this vLLM lacks a class where it is known to be: %s", error
        )
        return
    _after_init(EplbState, _enable)
    _after_init(WorkerBase, _check_worker)


def _after_init(owner: Any, then: Callable[[Any], None]) -> None:
    """Call `then` with every new object of a class."""
    original = owner.__init__
    if hasattr(original, _WRAPPED):
        return

    @functools.wraps(original)
    def init(made: Any, *args: Any, **kwargs: Any) -> None:
        original(made, *args, **kwargs)
        then(made)

    setattr(init, _WRAPPED, True)
    owner.__init__ = init


def _check_worker(worker: Any) -> None:
    """Warn where the plugin is enabled and vLLM balances nothing: nothing else shows it."""
    options = vllm_options(worker.vllm_config.additional_config)
    if not options.enabled:
        return
    if worker.vllm_config.parallel_config.enable_eplb:
        watch_load(worker, functools.partial(_unsupported, worker, options))
    elif worker.rank == 0:
        _share_log()
        _logger.warning("eplb_plugin is enabled, but vLLM runs without --enable-eplb: no expert will move")


def _unsupported(worker: Any, options: VllmOptions, line: str) -> None:
    """vLLM does not balance the model that this worker has loaded."""
    _warnings["no_eplb_support"] += 1
    if worker.rank == 0:
        _share_log()
        _logger.error("eplb_plugin is enabled, but %s", line)
    if (telemetry := engine_telemetry(options, worker.rank == 0)) is not None:
        telemetry.of(worker.model_config.model).warned("no_eplb_support")


def _enable(state: Any) -> None:
    """Have this state plan with us, where the plugin is enabled and vLLM has what it needs."""
    from vllm.config import get_current_vllm_config_or_none

    config = get_current_vllm_config_or_none()
    options = vllm_options(None if config is None else config.additional_config)
    compare = announce(options.model_dump_json() if options.enabled else "")
    restore_mapping()  # that of an earlier engine in this process
    if not options.enabled:
        return
    import vllm
    from vllm.v1.worker.worker_base import WorkerBase

    _share_log()
    if missing := missing_seams():
        _logger.error(
            "eplb_plugin is enabled, but vLLM %s lacks what it needs: %s. vLLM's own policy plans instead; "
            "tested with vLLM %s",
            vllm.__version__,
            "; ".join(missing),
            ", ".join(ADAPTER.tested),
        )
        return
    if untested := ADAPTER.untested(vllm.__version__):
        _logger.warning(untested)
    about = f"{version_of('eplb-plugin')} in vLLM {vllm.__version__}, options {options.model_dump_json()}"
    bind_policy(state, options, about, _active.append, compare)
    WorkerBase.eplb_plugin_report = _report
    WorkerBase.eplb_plugin_record = _record


def _share_log() -> None:
    """Send our lines through vLLM's logger, at its level and to its handlers."""
    logging.getLogger(__name__.partition(".")[0]).parent = logging.getLogger("vllm")


def _report(worker: Any) -> dict[str, Any]:
    """`llm.collective_rpc("eplb_plugin_report")`: the rebalances of this rank, as plain data."""
    import vllm
    from vllm.distributed.parallel_state import get_ep_group

    rank = get_ep_group().rank_in_group
    about = {"vllm": vllm.__version__, "plugin": version_of("eplb-plugin"), "rank": rank}
    return {**about, "warnings": dict(_warnings), **(_active[-1].report() if _active else {})}


def _record(worker: Any, folder: str | None = None) -> str | None:
    """`llm.collective_rpc("eplb_plugin_record", args=(folder,))`: record from now on; without one, stop.

    Returns:
        The folder, on the rank that writes.

    Raises:
        ConfigError: there is no model to record, or the folder cannot be made.
    """
    if not _active:
        raise ConfigError("eplb_plugin_record: the plugin plans for no model in this process")
    return _active[-1].record_to(folder)


def _in_file(config: Path | None) -> InFile:
    """The plugin's options in a file, for `doctor`; see `Adapter.in_file`."""
    section = read_section(KEY) if config is None else (read_yaml(config, 2**20, 10_000) or {}).get(KEY, {})
    try:
        found = vllm_options(None if config is None else {KEY: section})
    except ConfigError as error:
        if config is None:
            raise
        raise ConfigError(f"{config}: {str(error).removeprefix('additional_config: ')}") from None
    given = {name: value for name, value in found.model_dump(mode="json").items() if name in (section or {})}
    planner = given.pop("planner", {})
    given |= {f"planner.{name}": planner[name] for name in (section or {}).get("planner", {})}
    named = "the configuration file" if config is None else f"{config}, where {CONFIG_VARIABLE} names it"
    return InFile(named if found.enabled else None, {f"{KEY}.{name}": given[name] for name in given})


ADAPTER = Adapter(
    name="vLLM",
    package="vllm",
    entry_points="vllm.general_plugins",
    allowed_plugins="VLLM_PLUGINS",
    empty_allows_all=False,
    tested=("0.32",),
    checked=("0.33.0",),
    how_to_enable="off in the configuration; on with --additional-config "
    '\'{"eplb_plugin": {"enabled": true}}\'',
    in_file=_in_file,
)
