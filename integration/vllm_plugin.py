"""vLLM's entry point: `register` is called in each of its processes, and acts where the plugin is enabled."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from importlib.metadata import version as version_of
from typing import Any

from ..errors import ConfigError
from ..settings import CONFIG_VARIABLE, read_section
from .engine_options import EngineOptions, options_in_settings
from .vllm_policy import VllmPolicy
from .vllm_state import bind_policy, missing_seams

__all__ = ["KEY", "TESTED", "VllmOptions", "register", "vllm_options"]

_logger = logging.getLogger(__name__)

KEY = "eplb_plugin"
"""Where our options are, in vLLM's `additional_config` and in the configuration file."""

TESTED = ("0.32",)
"""The releases of vLLM that the tests run with."""

_WRAPPED = "_eplb_plugin_wrapped"
_active: list[VllmPolicy] = []  # of this process, the newest last


class VllmOptions(EngineOptions):
    """The options under `eplb_plugin`."""

    enabled: bool = False
    """Whether vLLM plans with this plugin."""


def vllm_options(additional_config: object) -> VllmOptions:
    """The options that vLLM was started with.

    Those under `eplb_plugin` in its `additional_config`, or else in the file, go over those of the
    environment, and these over the file's other sections.

    Raises:
        ConfigError: an unknown option or a wrong value.
    """
    source, values = "additional_config", None
    if isinstance(additional_config, Mapping):
        values = additional_config.get(KEY)
        for key in additional_config:
            if key != KEY and str(key).lower().replace("-", "_") == KEY:
                raise ConfigError(
                    f"additional_config: {key!r} is not known; the plugin's options are in {KEY!r}"
                )
    if values is None:
        source, values = CONFIG_VARIABLE, read_section(KEY)
    if values is None:
        values = {}
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
    """Make vLLM's `EplbState` look for our options when it is made. It may be called more than once.

    Raises:
        ConfigError: the configuration file is wrong; the start of vLLM ends with that.
    """
    vllm_options(None)
    try:
        from vllm.distributed.eplb.eplb_state import EplbState
    except ImportError as error:
        _share_log()
        _logger.error(
            "eplb_plugin cannot be enabled, this vLLM has no EplbState where it is known: %s", error
        )
        return
    if hasattr(EplbState.__init__, _WRAPPED):
        return
    original = EplbState.__init__

    @functools.wraps(original)
    def init(state: Any, *args: Any, **kwargs: Any) -> None:
        original(state, *args, **kwargs)
        _enable(state)

    setattr(init, _WRAPPED, True)
    EplbState.__init__ = init


def _enable(state: Any) -> None:
    """Have this state plan with us, where the plugin is enabled and vLLM has what it needs."""
    from vllm.config import get_current_vllm_config_or_none

    config = get_current_vllm_config_or_none()
    options = vllm_options(None if config is None else config.additional_config)
    if not options.enabled:
        return
    import vllm
    from vllm.v1.worker.worker_base import WorkerBase

    _share_log()
    missing = missing_seams(state)
    if missing:
        _logger.error(
            "eplb_plugin is enabled, but vLLM %s lacks what it needs: %s. vLLM's own policy plans instead; "
            "tested with vLLM %s",
            vllm.__version__,
            "; ".join(missing),
            ", ".join(TESTED),
        )
        return
    if ".".join(vllm.__version__.split(".")[:2]) not in TESTED:
        _logger.warning("eplb_plugin was tested with vLLM %s, not %s", ", ".join(TESTED), vllm.__version__)
    about = f"{version_of('eplb-plugin')} in vLLM {vllm.__version__}, options {options.model_dump_json()}"
    bind_policy(state, options, about, _active.append)
    WorkerBase.eplb_plugin_report = _report


def _share_log() -> None:
    """Let our lines come out as vLLM's do, at the level and through the handlers that it configures."""
    logging.getLogger(__name__.partition(".")[0]).parent = logging.getLogger("vllm")


def _report(worker: Any) -> dict[str, Any]:
    """`llm.collective_rpc("eplb_plugin_report")`: what this rank's policy did, as plain data."""
    import vllm
    from vllm.distributed.parallel_state import get_ep_group

    rank = get_ep_group().rank_in_group
    about = {"vllm": vllm.__version__, "plugin": version_of("eplb-plugin"), "rank": rank}
    return {**about, **(_active[-1].report() if _active else {})}
