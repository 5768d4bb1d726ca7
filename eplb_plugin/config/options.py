"""The options of all parts: frozen pydantic models without unknown keys. Docstrings are the option help."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticCustomError

from ..core.errors import ConfigError

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "AUTO_MOVE_PRICE",
    "DemoOptions",
    "EnsembleOptions",
    "MetricsOptions",
    "Options",
    "PlannerOptions",
    "RebalancerOptions",
    "SimulateOptions",
]

AUTO_MOVE_PRICE = 0.009
"""`planner.move_price: auto` where it is unknown what a move costs."""

_NUMBER = "number"  # the branch of a number beside `auto`, which errors leave out
_shorten = reprlib.Repr()
_shorten.maxstring = _shorten.maxother = 120


@contextmanager
def _config_errors(model: type[BaseModel]) -> Iterator[None]:
    """Turn a pydantic error into a ConfigError of one line."""
    try:
        yield
    except ValidationError as error:
        lines = []
        for item in error.errors():
            place = [p for p in item["loc"] if p != _NUMBER]
            where = ".".join(str(p) if str(p).isidentifier() else _shown(p) for p in place)
            told: object = f"{item['msg']} (got {_shown(item['input'])})"
            inner = item.get("ctx", {}).get("error")
            if isinstance(inner, ConfigError):  # of a nested model, or of this very model: complete already
                if not where:
                    raise inner from None
                told = inner
            lines.append(f"{where}: {told}" if where else f"{told}")
        raise ConfigError(f"{model.__name__}: " + "; ".join(lines)) from None


def _shown(value: object) -> str:
    """The value on one line of at most 120 characters or so."""
    try:
        return _shorten.repr(value)
    except ValueError:  # Python refuses to print integers of thousands of digits
        return f"a {type(value).__name__} that is too long to show"


class Options(BaseModel):
    """Base of all option models. A wrong value raises ConfigError, from Python, a mapping or JSON.

    Numbers may be text, as in environment variables; a bool is not a number. `model_copy` and
    `model_construct` are pydantic's own and check nothing.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    def __init__(self, **values: Any) -> None:
        with _config_errors(type(self)):
            super().__init__(**values)

    @classmethod
    def model_validate(cls, *arguments: Any, **options: Any) -> Self:
        with _config_errors(cls):
            return super().model_validate(*arguments, **options)

    @classmethod
    def model_validate_json(cls, *arguments: Any, **options: Any) -> Self:
        with _config_errors(cls):
            return super().model_validate_json(*arguments, **options)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_bool_for_number(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and bool not in (annotation, *get_args(annotation)):
            raise PydanticCustomError("bool_for_number", "Input should not be a bool")
        return value


def _branch(value: object) -> str:
    return "auto" if value == "auto" else _NUMBER


class EnsembleOptions(Options):
    """The ensemble packer, of the policy `ensemble` and of `balanced_packing`."""

    objective: Literal["peak", "spread"] = "peak"
    """What packing minimises: the load of the heaviest pack, or heaviest minus lightest."""
    num_candidates: int = Field(128, ge=1, le=4096)
    """Candidate packings of each row; the best 16 are refined. 1: longest processing time first alone."""
    memory_mib: int = Field(256, ge=1)
    """Bound on the scratch memory of packing, in MiB. Rows are packed in slices that fit."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of the candidates' noise. The same seed and load give the same packing everywhere."""


class PlannerOptions(Options):
    """How a placement is planned."""

    policy: str = "adaptive"
    """`adaptive`: exchanges from the placement in force; `ensemble`: from scratch, by the vectorized ensemble
    packer; `greedy`: from scratch, by the algorithm of today's engines."""
    dispatch: Literal["auto", "even", "balanced"] = "auto"
    """What a plan expects of the engine. `even`: the tokens of an expert spread evenly over its replicas.
    `balanced`: each batch is split by dispatch `balanced`. `adaptive` improves its plan for that, from single
    steps; the plans of the other policies are measured with it. `auto`: the dispatch of the loop or the
    engine; `even` for a plan alone, and offline."""
    move_price: Annotated[
        Annotated[float, Field(ge=0, allow_inf_nan=False), Tag(_NUMBER)]
        | Annotated[Literal["auto"], Tag("auto")],
        Discriminator(_branch),
    ] = "auto"
    """`adaptive`: minimum reduction of the peak rank load for each expert transferred, as a fraction of the
    mean slot load. Higher: fewer transfers. 0: transfers are free, and a plan from scratch is tried too.
    `auto`: from the time of a transfer and of a step, 0.002 to 0.128; 0.009 where they are unknown. Steady
    traffic lowers it to as little as a twentieth. Setting apart replicas that share a rank costs nothing."""
    max_moves: int | None = Field(None, ge=0, le=2**31)
    """`adaptive`: most experts transferred per layer and rebalance; null: no bound. Filling empty slots,
    placing lost experts and bringing the groups of a layer into one node each may exceed it, and count. The
    other policies refuse it, since they plan from scratch."""
    min_gain: float = Field(0.002, ge=0, lt=1)
    """Skip rule: a layer keeps its placement if its predicted balancedness rises by less. 0.002: from 0.900
    to less than 0.902."""
    snapshot_decay: float = Field(0.975, gt=0, le=1)
    """Weight of a snapshot relative to the next one in time; 1 weighs all equally."""
    persistence: float = Field(0.7, ge=0, le=1)
    """Forecast: the fraction of the difference between the load of the moment and the mean of the window that
    is expected to last. 0 plans for the mean, 1 for the moment."""
    ensemble: EnsembleOptions = EnsembleOptions()
    """`ensemble`: the packer. `objective`: peak or spread; `num_candidates`: candidate packings of each row;
    `memory_mib`: bound on scratch memory, in MiB; `seed` of the candidates' noise."""

    @property
    def known_price(self) -> float:
        """`move_price` as a number: a plan alone does not know what a move costs."""
        return AUTO_MOVE_PRICE if self.move_price == "auto" else self.move_price

    def for_dispatch(self, splits: bool) -> PlannerOptions:
        """These options for a loop or an engine, without `auto`.

        Args:
            splits: whether dispatch `balanced` splits whole batches there, and single steps are kept of them.

        Raises:
            ConfigError: plans for dispatch `balanced` where it is not.
        """
        if self.dispatch == "balanced" and not splits:
            raise ConfigError(
                "planner.dispatch='balanced' needs dispatch='balanced' of whole batches, and samples above 0"
            )
        dispatch = "balanced" if splits and self.dispatch != "even" else "even"
        return self.model_copy(update={"dispatch": dispatch})


class RebalancerOptions(Options):
    """The online loop."""

    mode: Literal["async", "sync", "observe"] = "async"
    """`async`: plan and transfer in the background while the model serves, and switch between steps. `sync`:
    do all of it within the last step of an interval. `observe`: count and report, plan and move nothing."""
    record: str | None = Field(None, min_length=1, max_length=4096)
    """Folder for recorded loads: rank 0 writes one file for each interval, beside serving. `eplb-plugin
    advise FOLDER` reads it. null: nothing is recorded."""
    record_mib: int = Field(256, ge=1, le=2**20)
    """Bound on the files of `record`, in MiB; the oldest are removed first. Example: 58 layers, 256 experts
    take about 1.5 MiB for each interval."""
    interval: int = Field(1000, ge=1)
    """Steps between two rebalances."""
    snapshots: int = Field(32, ge=1, le=1024)
    """Maximum number of snapshots of an interval. Example: 1000 steps make 32 snapshots of 31 or 32 steps."""
    samples: int = Field(16, ge=0, le=1024)
    """Single steps kept of an interval, evenly spaced: to measure and to plan for dispatch `balanced`, and
    for `record`."""
    history: int = Field(4, ge=1, le=64)
    """Intervals in the window of a plan."""
    planning: Literal["leader", "sharded"] = "leader"
    """`leader`: rank 0 plans and broadcasts. `sharded`: each rank plans a share of the layers."""
    dispatch: str = "even"
    """Replica of each token. `even`: all replicas of the expert equally. `local_first`: replicas on the
    token's own rank, if there are any. `balanced`: each batch is split so that all ranks finish together."""
    batch: Literal["sharded", "own", "replicated"] = "sharded"
    """Dispatch `balanced`: tokens that are split together. `sharded`: of all ranks, after one all-gather of
    counts per layer. `own`: of this rank alone, without a message, for half of the gain. `replicated`: every
    rank has all tokens, in the same order; no message."""
    expert_cost: Annotated[int, Field(ge=0, le=2**20)] | Literal["auto"] = 0
    """Dispatch `balanced`: least cost of a replica in use, in tokens: time to read its weights over time of a
    token. `auto`: from the weights and the accelerator. Example: with 32, an expert with 20 tokens goes to
    one replica."""
    staging_mib: int = Field(256, ge=1)
    """Bound on the receive buffers of weights, in MiB per rank. A larger layer switches in several steps;
    after each of them the placement is valid."""
    commit_layers: int = Field(1, ge=1)
    """Mode `async`: layers that switch in one step."""
    background_share: float = Field(0.05, gt=0, le=1)
    """Mode `async`: maximum share of a CPU core for background work, on average; 1 is no bound. Lower:
    shorter pauses of steps, longer rebalances. Example: with 0.05, 100 ms of work take 2 s."""
    bandwidth: float | None = Field(None, gt=0, allow_inf_nan=False)
    """`planner.move_price: auto`: bandwidth of a rank to other ranks, in GB/s per direction, until transfers
    have been measured. null: 400 on one node, 45 between nodes."""
    step_ms: float = Field(40.0, gt=0, allow_inf_nan=False)
    """`planner.move_price: auto`: duration of a forward step in milliseconds, until steps have been
    measured."""
    time_limit: float = Field(30.0, gt=0, le=3600)
    """Time limit of each phase, in seconds. A rank that waits longer turns balancing off; the placement in
    force stays."""
    verify: Literal["off", "sampled", "all"] = "sampled"
    """Comparison of moved weights with their fingerprints: none, some bytes of each tensor, or all bytes."""

    @property
    def keeps_samples(self) -> bool:
        """Whether single steps are kept at all."""
        return self.dispatch == "balanced" or self.record is not None

    @property
    def splits(self) -> bool:
        """Whether dispatch `balanced` splits whole batches, with single steps to plan from."""
        return self.dispatch == "balanced" and self.batch != "own" and self.samples > 0


class MetricsOptions(Options):
    """Prometheus metrics, served by the first rank. In vLLM and SGLang the engine serves them."""

    enabled: bool = False
    """Whether to serve metrics."""
    host: str = Field("127.0.0.1", min_length=1)
    """Address to listen on. 0.0.0.0 is reachable from other machines, without a password."""
    port: int = Field(9400, ge=0, le=65535)
    """Port to listen on; 0 takes a free port."""


class SimulateOptions(Options):
    """Offline replay of a load. Its window is set in the section `rebalancer`."""

    ranks: int = Field(8, ge=1, le=2**16)
    """Ranks (GPUs) of the expert-parallel group."""
    slots: int | None = Field(None, ge=1, le=2**20)
    """Physical experts over all ranks; by default one spare slot per rank."""
    rank_slots: tuple[Annotated[int, Field(ge=0, le=2**20)], ...] | None = Field(None, min_length=1)
    """Slots of each rank, such as [5, 5, 3], in place of `ranks` and `slots`; null: as many on all ranks."""
    nodes: int = Field(1, ge=1)
    """Nodes, with equally many ranks each."""
    groups: int = Field(1, ge=1)
    """Groups of logical experts per layer; 1 without group-limited routing."""
    policies: tuple[str, ...] = Field(("static", "greedy", "adaptive"), min_length=1)
    """Policies to compare."""
    dispatches: tuple[str, ...] = Field(("even",), min_length=1)
    """Dispatches to compare on single steps. `even`: equal shares. `balanced`: each batch is split so that
    all ranks finish together. `sampled`: replicas drawn by the best shares, as SGLang's `lp` does."""
    expert_cost: int = Field(0, ge=0, le=2**20)
    """Dispatches: least cost of a replica in use, in tokens. Above 0, the cost of the slowest rank is
    compared."""
    expert_mb: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Size of one expert in MB, for `planner.move_price: auto`. null: unknown, and the price is 0.009."""
    message_us: float = Field(20.0, gt=0, le=1e6)
    """`report` and `advise`: assumed time of the all-gather of counts that dispatch `balanced` needs, in
    microseconds for each layer and batch. 20: about eight GPUs of a node. There is none with
    `rebalancer.batch: replicated`."""
    mode: Literal["decode", "prefill"] = "decode"
    """Token traces: replay as steps of decode or of prefill."""
    batch: int = Field(256, ge=1, le=2**20)
    """Decode: requests in flight."""
    max_tokens: int = Field(2048, ge=1)
    """Prefill: maximum number of tokens of a step."""
    steps: int | None = Field(None, ge=1, le=2**24)
    """Decode and generated traffic: steps; by default eight intervals."""
    tokens_per_step: int = Field(2048, ge=1, le=2**24)
    """Generated traffic: tokens of a step."""
    topics: int = Field(4, ge=1, le=1024)
    """Generated traffic: number of topics, or kinds of requests."""
    drift: float = Field(1.5, ge=0, le=10)
    """Decode and generated traffic: drift of the topic mix. 0: none; 1: clear; 3: one topic dominates at a
    time."""
    period: float = Field(4096, ge=1)
    """Decode and generated traffic: typical number of steps between two highs of a topic."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Decode, generated traffic and the dispatch `sampled`: seed of all random draws."""


class DemoOptions(Options):
    """The demo. Its interval and dispatch replace those of `rebalancer`. Background work is not throttled."""

    ranks: int = Field(4, ge=1, le=64)
    """Ranks, one process each."""
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
    """Number of topics, or kinds of requests; a trace has its own."""
    drift: float = Field(1.5, ge=0, le=10)
    """Drift of the topic mix. 0: none; 1: clear; 3: one topic dominates at a time."""
    period: float = Field(192, ge=1)
    """Typical number of steps between two highs of a topic."""
    steps: int = Field(192, ge=2)
    """Steps, with one batch per rank each."""
    tokens: int = Field(128, ge=1)
    """Tokens of a batch, per rank."""
    interval: int = Field(24, ge=1)
    """Steps between two rebalances."""
    dispatch: str = "balanced"
    """Replica of each token, with rebalancing; `even` without."""
    trace: str | None = None
    """Token trace (`.npz`) whose categories of requests are the topics; by default topics are generated."""
    mode: Literal["decode", "prefill"] = "decode"
    """With a trace: replay requests in flight (decode), or its tokens in file order (prefill)."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of the model and of the traffic."""
    time_limit: float = Field(180, gt=0)
    """Seconds without progress of any rank until the demo is stopped. The total time is unlimited."""
