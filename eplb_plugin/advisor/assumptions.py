"""What `advise` takes for the size of an expert, its cost and a step, by option, recording or guess."""

from __future__ import annotations

from contextlib import suppress
from typing import NamedTuple

import torch

from ..config.sources import Settings
from ..core.errors import ConfigError
from ..dispatch.accelerators import find_accelerator
from ..dispatch.expert_cost import BANDWIDTH, COMPUTE, cost_in_tokens, token_seconds
from ..formats.recordings import Recording
from ..offline.traces import LoadTrace
from .advice import busy_layers
from .machine import ModelPreset, model_preset, model_presets, models_of_shape

__all__ = ["STEP_MS", "ExpertCost", "ExpertSize", "StepTime", "assumed_cost", "size_of_expert", "step_time"]

STEP_MS = 40.0
"""Duration of an engine step that is neither given nor recorded, in milliseconds."""


class ExpertCost(NamedTuple):
    """The expert cost in tokens, the time of a token if it is known, and a sentence about both."""

    tokens: int
    token_seconds: float | None
    said: str


def assumed_cost(
    settings: Settings, model: str, preset: ModelPreset | None, accelerator: str | None
) -> ExpertCost:
    """From the option, or from the model and the accelerator that is told or found."""
    given = settings.simulate.expert_cost if "simulate.expert_cost" in settings.origins else None
    found = None if accelerator is None else find_accelerator(accelerator)
    if found is None and torch.cuda.is_available():
        with suppress(ConfigError):  # an accelerator that nobody named and the table lacks
            found = find_accelerator(torch.cuda.get_device_name())
    if accelerator is not None and preset is None and given is None:
        raise ConfigError(
            f"--accelerator {accelerator}: the parameters of an expert are unknown; give --model or "
            "--expert-cost"
        )
    token = None if found is None or preset is None else token_seconds(found, preset.parameters)
    if given is not None:
        return ExpertCost(given, token, f"expert_cost is {given} tokens, as given.")
    if found is None or preset is None:
        return ExpertCost(
            0, None, "expert_cost is 0, tokens alone; --model with --accelerator gives another."
        )
    tokens = cost_in_tokens(found, preset.bytes_per_expert, preset.parameters)
    size = f"{preset.bytes_per_expert / 1e6:.1f} MB"
    reached = f"{COMPUTE:.0%} of its peak compute and {BANDWIDTH:.0%} of its bandwidth"
    said = f"expert_cost is {tokens} tokens: an expert of {model} ({size}) on {found.name}, at {reached}."
    return ExpertCost(tokens, token, said)


class ExpertSize(NamedTuple):
    """The size of an expert, the model that it is of, if known, and sentences about a guess."""

    num_bytes: float
    name: str
    preset: ModelPreset | None
    said: list[str]


def size_of_expert(
    trace: str, model: str | None, expert_mb: float | None, load: LoadTrace, recording: Recording | None
) -> ExpertSize:
    """From the options, the traffic profile, the recording, or the shape of the load."""
    if expert_mb is not None:
        return ExpertSize(1e6 * expert_mb, "the model", None, [])
    if model is not None or trace in model_presets():
        preset = model_preset(model or trace)
        return ExpertSize(preset.bytes_per_expert, model or trace, preset, [])
    layers, recorded = busy_layers(load), 0.0 if recording is None else recording.newest.expert_bytes
    shape = f"{layers} MoE layers of {load.num_experts} experts"
    if guesses := models_of_shape(layers, load.num_experts, recorded):
        preset, others = model_preset(guesses[0]), guesses[1:]
        size = recorded or preset.bytes_per_expert
        also = f" They fit {', '.join(others)} too." if others else ""
        said = f"{shape}, {size / 1e6:.1f} MB each, are taken for {guesses[0]}; --model names another.{also}"
        return ExpertSize(size, guesses[0], preset, [said])
    if recorded:
        said = f"{shape} fit no known model; an expert has {recorded / 1e6:.3g} MB, as recorded."
        return ExpertSize(recorded, "the model", None, [said])
    raise ConfigError(
        f"how large is an expert? Give --expert-mb, or --model with one of {', '.join(model_presets())}"
    )


class StepTime(NamedTuple):
    """Duration of an engine step, whether somebody measured it, and a sentence about that."""

    seconds: float
    is_measured: bool
    said: list[str]


def step_time(step_ms: float | None, recording: Recording | None) -> StepTime:
    """From the option, the recording, or `STEP_MS`."""
    if step_ms is not None:
        return StepTime(step_ms / 1000, True, [])
    if recording is None:
        return StepTime(STEP_MS / 1000, False, [])
    if not recording.step_seconds:
        return StepTime(
            STEP_MS / 1000, False, [f"No step was timed; {STEP_MS:g} ms are assumed, or --step-ms."]
        )
    took = f"A step took {1000 * recording.step_seconds:.3g} ms, the median of the recording."
    return StepTime(recording.step_seconds, True, [took])
