"""The models of `configs/models.yaml`: number and size of their experts."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType

import yaml
from pydantic import Field

from ..config.options import Options
from ..core.errors import ConfigError

__all__ = ["ModelPreset", "model_preset", "model_presets"]


class ModelPreset(Options):
    """The shape of a model's experts."""

    source: str
    """Source of the numbers."""

    layers: int = Field(ge=1)
    """MoE layers."""

    experts: int = Field(ge=1)
    """Logical experts per layer."""

    top_k: int = Field(ge=1)
    """Experts per token."""

    groups: int = Field(ge=1)
    """Groups of logical experts; 1 without group-limited routing."""

    hidden: int = Field(ge=1)
    """Size of the residual stream."""

    expert_hidden: int = Field(ge=1)
    """Inner size of each expert."""

    bits_per_weight: float = Field(gt=0)
    """Bits of a weight, including its share of the scales."""

    @property
    def bytes_per_expert(self) -> float:
        """Size of the gate, up and down projections of one expert."""
        return 3 * self.hidden * self.expert_hidden * self.bits_per_weight / 8


@cache
def model_presets() -> Mapping[str, ModelPreset]:
    """All presets, by name.

    Raises:
        ConfigError: the file is missing or malformed.
    """
    package = Path(__file__).resolve().parents[1]
    # Inside the package in a wheel, beside it in a checkout.
    paths = [folder / "configs" / "models.yaml" for folder in (package, package.parent)]
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        raise ConfigError(f"{paths[0]}: no such file; the installation is not complete")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))["models"]
    return MappingProxyType({name: ModelPreset(**values) for name, values in content.items()})


def model_preset(name: str) -> ModelPreset:
    """The preset `name`.

    Raises:
        ConfigError: unknown name; the message lists the known ones.
    """
    try:
        return model_presets()[name]
    except KeyError:
        raise ConfigError(f"no model {name!r}; there are {', '.join(model_presets())}") from None
