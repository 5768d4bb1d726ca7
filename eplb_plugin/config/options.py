"""The options of every part: frozen pydantic models that refuse unknown keys."""

from __future__ import annotations

import reprlib
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from ..core.errors import ConfigError

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "DemoOptions",
    "MetricsOptions",
    "Options",
    "PlannerOptions",
    "RebalancerOptions",
    "SimulateOptions",
    "config_error",
]


_shorten = reprlib.Repr()
_shorten.maxstring = _shorten.maxother = 120


def config_error(source: str, error: ValidationError) -> ConfigError:
    """The pydantic error as one line per wrong option, `source` naming where the values came from."""
    lines = []
    for item in error.errors():
        where = ".".join(str(p) if str(p).isidentifier() else _shown(p) for p in item["loc"])
        told: object = f"{item['msg']} (got {_shown(item['input'])})"
        inner = item.get("ctx", {}).get("error")
        if isinstance(inner, ConfigError):  # a model within has said it all, or this very model
            if not where:
                return inner
            told = inner
        lines.append(f"{where}: {told}" if where else f"{told}")
    return ConfigError(f"{source}: " + "; ".join(lines))


def _shown(value: object) -> str:
    """The value on one line of bounded length, whatever it is."""
    try:
        return _shorten.repr(value)
    except ValueError:  # Python refuses to print integers of thousands of digits
        return f"a {type(value).__name__} that is too long to show"


class Options(BaseModel):
    """Base of all option models. A wrong value raises ConfigError, from Python, a mapping or JSON;
    `model_copy` and `model_construct` are pydantic's own, which check nothing.

    Numbers may be text, as in environment variables. A bool is no number.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise config_error(type(self).__name__, error) from None

    @classmethod
    def model_validate(cls, *arguments: Any, **options: Any) -> Self:
        try:
            return super().model_validate(*arguments, **options)
        except ValidationError as error:
            raise config_error(cls.__name__, error) from None

    @classmethod
    def model_validate_json(cls, *arguments: Any, **options: Any) -> Self:
        try:
            return super().model_validate_json(*arguments, **options)
        except ValidationError as error:
            raise config_error(cls.__name__, error) from None

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_bool_for_number(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and bool not in (annotation, *get_args(annotation)):
            raise PydanticCustomError("bool_for_number", "Input should not be a bool")
        return value


class PlannerOptions(Options):
    """How a placement is planned."""

    policy: Literal["ensemble", "greedy"] = "ensemble"
    """`ensemble`: many candidates, refined; `greedy`: the plain algorithm that engines use today."""

    objective: Literal["peak", "spread"] = "peak"
    """What packing minimises: the load of the heaviest pack, or heaviest minus lightest."""

    num_candidates: int = Field(128, ge=1, le=4096)
    """Candidate packings per row; 1 is LPT alone."""

    refine_rounds: int = Field(20, ge=0, le=1000)
    """Effort of refinement. The compiled search makes at most ten times as many exchanges; the tensor version
    makes a fifth as many rounds of swaps between all packs, and up to that many of single swaps."""

    tolerance: float = Field(5e-4, ge=0, lt=1)
    """The compiled search is finished with a row when its peak is within this share of the lower bound."""

    move_price: float = Field(0.009, ge=0, allow_inf_nan=False)
    """What an exchange has to lower the peak by for each of its moves, as a share of the mean load of a slot.
    With 0 moves are free and a placement from scratch is tried too. Replicas that share a rank are parted at
    any price."""

    max_moves: int | None = Field(None, ge=0, le=2**31)
    """Most moves per layer and rebalance; None leaves it to the price. What fills empty slots, or gives a
    slot to an expert that has none, is done whatever the bound, and counts. A layer whose placement in force
    breaks the hierarchical policy is brought to fit it whatever that takes. Not with the policy `greedy` or
    the objective `spread`, which plan from scratch and cannot keep it."""

    min_gain: float = Field(0.002, ge=0, lt=1)
    """Skip rule: a layer whose predicted balancedness rises by less than this stays as it is."""

    snapshot_decay: float = Field(0.975, gt=0, le=1)
    """Weight of a snapshot relative to the next one in time; 1 weighs all alike."""

    persistence: float = Field(0.7, ge=0, le=1)
    """How much of the difference between the load of the moment and the mean of the window is expected to
    last while a plan is in force: 0 is none of it, 1 all."""

    memory_mib: int = Field(256, ge=1)
    """Bound on the scratch memory of packing, in MiB; more work is done in slices."""

    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of the candidates' noise. The same seed and load give the same plan everywhere."""

    @model_validator(mode="after")
    def _refuse_a_bound_that_cannot_be_kept(self) -> Self:
        if self.max_moves is not None and (self.policy == "greedy" or self.objective == "spread"):
            name = "policy='greedy'" if self.policy == "greedy" else "objective='spread'"
            raise PydanticCustomError(
                "bound_of_moves", f"max_moves={self.max_moves} cannot be kept: {name} plans from scratch"
            )
        return self


class RebalancerOptions(Options):
    """How the online loop runs."""

    mode: Literal["async", "sync"] = "async"
    """`async`: plan and move weights in the background while the model serves, switch over between steps;
    `sync`: do all of it within the step that ends an interval."""

    interval: int = Field(1000, ge=1)
    """Steps between two rebalances."""

    snapshots: int = Field(32, ge=1, le=1024)
    """Snapshots that an interval is folded into (fewer where the interval has fewer steps)."""

    history: int = Field(4, ge=1, le=64)
    """Intervals that the window spans; a plan is made from all of them."""

    planning: Literal["leader", "sharded"] = "leader"
    """`leader`: rank 0 plans and broadcasts; `sharded`: every rank plans its share of the layers."""

    local_first: bool = False
    """Send a token to a replica on its own rank when there is one, instead of spreading evenly."""

    staging_mib: int = Field(256, ge=1)
    """Bound on the buffers that receive weights, in MiB per rank. A layer that needs more is switched over in
    several steps, each of which is a valid placement."""

    commit_layers: int = Field(1, ge=1)
    """Layers that switch over in one step when `mode` is `async`."""

    background_share: float = Field(0.05, gt=0, le=1)
    """Share of a core's time that the background of `mode: async` takes on average, so that no step pays for
    more than a small piece of a rebalance; a rebalance takes longer accordingly. 1 is no bound."""

    time_limit: float = Field(30.0, gt=0, le=3600)
    """Seconds that a rank waits for the others in each phase. After that balancing is turned off, and the
    placement in force stays."""

    verify: Literal["off", "sampled", "all"] = "sampled"
    """What is compared with the fingerprints of the weights when an expert has moved: nothing, some bytes of
    every tensor, or every byte."""


class MetricsOptions(Options):
    """Figures for Prometheus, served by the first rank. In vLLM and SGLang, the engine serves them."""

    enabled: bool = False
    """Whether there are any."""

    host: str = Field("127.0.0.1", min_length=1)
    """Address to answer on; 0.0.0.0 is reachable from other machines, without a password."""

    port: int = Field(9400, ge=0, le=65535)
    """Port to answer on; 0 takes one that is free."""


class SimulateOptions(Options):
    """What `eplb-plugin simulate` replays. Its window is that of the `rebalancer` section."""

    ranks: int = Field(8, ge=1, le=2**16)
    """Ranks of the expert-parallel group."""

    slots: int | None = Field(None, ge=1, le=2**20)
    """Physical experts over all ranks; null: room for all experts and one spare slot per rank."""

    rank_slots: tuple[Annotated[int, Field(ge=0, le=2**20)], ...] | None = Field(None, min_length=1)
    """Slots of each rank, such as [5, 5, 3], in place of `ranks` and `slots`; null: as many on all ranks."""

    nodes: int = Field(1, ge=1)
    """Nodes that the ranks are spread over."""

    groups: int = Field(1, ge=1)
    """Groups of experts per layer."""

    policies: tuple[str, ...] = Field(("static", "greedy", "ensemble"), min_length=1)
    """Policies to compare."""

    mode: Literal["decode", "prefill"] = "decode"
    """How a token trace becomes steps."""

    batch: int = Field(256, ge=1, le=2**20)
    """Decode: requests in flight."""

    max_tokens: int = Field(2048, ge=1)
    """Prefill: most tokens of one step."""

    steps: int | None = Field(None, ge=1, le=2**24)
    """Decode and generated traffic: steps; null: eight intervals. Prefill takes the file as it is."""

    tokens_per_step: int = Field(2048, ge=1, le=2**24)
    """Generated traffic: tokens of each step."""

    topics: int = Field(4, ge=1, le=1024)
    """Generated traffic: kinds of requests."""

    drift: float = Field(1.5, ge=0, le=10)
    """Decode and generated traffic: how strongly the mix of topics changes; 0 keeps it."""

    period: float = Field(4096, ge=1)
    """Decode and generated traffic: typical steps from one high of a topic to the next."""

    seed: int = Field(0, ge=0, lt=2**32)
    """Decode and generated traffic: seed of all draws."""


class DemoOptions(Options):
    """What `eplb-plugin demo` serves. Its `interval` is its own, and its background does not rest."""

    ranks: int = Field(4, ge=1, le=64)
    """Processes, one for each rank."""

    layers: int = Field(4, ge=1)
    """MoE layers of the model."""

    experts: int = Field(32, ge=1)
    """Logical experts per layer."""

    slots: int = Field(40, ge=1)
    """Physical experts over all ranks."""

    top_k: int = Field(4, ge=1)
    """Experts per token."""

    hidden: int = Field(64, ge=1)
    """Size of the residual stream."""

    expert_hidden: int = Field(128, ge=1)
    """Inner size of each expert."""

    topics: int = Field(8, ge=1, le=1024)
    """Kinds of requests; with a trace, its categories take their place."""

    drift: float = Field(1.5, ge=0, le=10)
    """How strongly the mix of topics changes; 0 keeps it."""

    period: float = Field(192, ge=1)
    """Typical steps from one high of a topic to the next."""

    steps: int = Field(192, ge=2)
    """Batches that each rank serves."""

    tokens: int = Field(128, ge=1)
    """Tokens of each batch, per rank."""

    interval: int = Field(24, ge=1)
    """Steps between two rebalances."""

    trace: str | None = None
    """Token trace (`.npz`) whose categories of requests drive the topics; null draws them."""

    mode: Literal["decode", "prefill"] = "decode"
    """With a trace: replay requests in flight, or take its tokens in file order."""

    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of the model and of the traffic."""

    time_limit: float = Field(180, gt=0)
    """Seconds without progress of any rank after which a demo is stopped; it may take any time in all."""
