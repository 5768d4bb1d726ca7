"""The options of the plugin in an engine, their places among the settings, and numbers that do not fit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from ...config.options import Options, PlannerOptions
from ...config.sources import load_settings
from ...planning.policies import policy_for

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["EngineOptions", "SHARED", "options_in_settings", "uneven_slots"]

SHARED: Mapping[str, str] = MappingProxyType(
    {
        "snapshots": "rebalancer.snapshots",
        "samples": "rebalancer.samples",
        "history": "rebalancer.history",
        "dispatch": "rebalancer.dispatch",
        "expert_cost": "rebalancer.expert_cost",
        "bandwidth": "rebalancer.bandwidth",
        "step_ms": "rebalancer.step_ms",
        "record": "rebalancer.record",
        "record_mib": "rebalancer.record_mib",
        "metrics": "metrics.enabled",
    }
)
"""Setting of each engine option outside the section `planner`."""


class EngineOptions(Options):
    """Options of the plugin in any engine. The engine itself decides when to rebalance."""

    mode: Literal["balance", "observe"] = "balance"
    """`balance`: plan each rebalance. `observe`: report the balancedness, plan nothing and keep the map."""
    record: str | None = Field(None, min_length=1, max_length=4096)
    """Folder for recorded loads: the first rank writes one file for each interval, beside serving.
    `eplb-plugin advise FOLDER` reads it. null: nothing is recorded."""
    record_mib: int = Field(256, ge=1, le=2**20)
    """Bound on the files of `record`, in MiB; the oldest are removed first."""

    planner: PlannerOptions = Field(default_factory=PlannerOptions)
    """How placements are planned."""
    snapshots: int = Field(32, ge=1, le=1024)
    """Maximum number of snapshots of one interval: 3,000 steps become 32 sums of 94 steps or fewer."""
    samples: int = Field(16, ge=0, le=1024)
    """Single steps kept of an interval, evenly spaced: to measure dispatch `balanced`, and for `record`."""
    history: int = Field(4, ge=1, le=64)
    """Intervals in the window: a plan is made from the latest 4."""
    dispatch: Literal["even", "engine", "balanced"] = "even"
    """Replica of each token. `even`: the engine's own mapping; with SGLang's `static`, from a table in which
    the replicas of an expert serve equally many ranks. `engine`: SGLang's own table, otherwise as `even`.
    `balanced`: each batch is split so that all ranks finish together."""
    expert_cost: Annotated[int, Field(ge=0, le=2**20)] | Literal["auto"] = 0
    """Dispatch `balanced`: least cost of a replica in use, in tokens. `auto`: from the weights and the
    accelerator."""
    bandwidth: float | None = Field(None, gt=0, allow_inf_nan=False)
    """`planner.move_price: auto`: bandwidth of a rank to other ranks, in GB/s per direction. null: 400 on one
    node, 45 between nodes."""
    step_ms: float = Field(40.0, gt=0, allow_inf_nan=False)
    """`planner.move_price: auto`: duration of a forward step, in milliseconds."""
    check_agreement: bool = True
    """Compare the plan between ranks before the engine acts on it: engines hang when ranks differ."""
    metrics: bool = False
    """Show the rebalances on the engine's own `/metrics`."""

    @model_validator(mode="after")
    def _refuse_unfit_policy(self) -> Self:
        policy_for(self.planner)
        self.planner.for_dispatch(self.splits)
        return self

    @property
    def engine_table(self) -> bool:
        """Whether SGLang's own table of dispatch `static` stays. `mode: observe` changes nothing."""
        return self.dispatch == "engine" or self.mode == "observe"

    @property
    def splits(self) -> bool:
        """Whether dispatch `balanced` is asked for, with single steps to plan from."""
        return self.dispatch == "balanced" and self.samples > 0


def options_in_settings(
    path: str | Path | None = None, overrides: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Engine options from the file, the environment and `overrides`, each over the one before.

    Args:
        path: YAML file; None is the file in EPLB_PLUGIN_CONFIG, if any.
        overrides: as for `load_settings`.

    Returns:
        Values for `EngineOptions`: `planner` as a dict, `mode`, and those of `SHARED`.

    Raises:
        ConfigError: an unknown section or option, or a wrong value.
    """
    settings = load_settings(path, overrides).model_dump()
    # Only that mode means the same in an engine, which moves weights in its own way.
    mode = "observe" if settings["rebalancer"]["mode"] == "observe" else "balance"
    values = {"planner": settings["planner"], "mode": mode}
    for name, place in SHARED.items():
        section, option = place.split(".")
        values[name] = settings[section][option]
    return values


def uneven_slots(experts: int, redundant: int, ranks: int, option: str) -> str | None:
    """What is wrong where the slots do not spread evenly over the ranks; None where they do.

    Example: 256 experts, 0 redundant ones and 3 ranks with `option` num_redundant_experts end in
    "num_redundant_experts=2 would be".

    Args:
        experts: logical experts per layer.
        redundant: slots beyond them.
        ranks: of the expert-parallel group.
        option: of the engine, for the number of redundant experts.
    """
    slots = experts + redundant
    if slots % ranks == 0:
        return None
    above = -(-slots // ranks) * ranks - experts
    below = above - ranks
    right = f"{option}={above}" if below < 0 else f"{option}={below} or {above}"
    return (
        f"{option}={redundant}: {experts} experts and {redundant} redundant ones are {slots} slots, not "
        f"divisible by {ranks} ranks; {right} would be"
    )
