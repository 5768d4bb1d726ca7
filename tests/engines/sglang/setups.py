"""What goes to the ranks of `eplb_ranks` and comes back from them; importing it imports no engine."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Setup:
    """What all ranks run. Layer 0 is dense."""

    layers: int = 4
    logical: int = 12
    redundant: int = 4
    interval: int = 12
    rebalances: int = 6
    layers_per_chunk: int | None = None
    algorithm: str = "eplb_plugin"
    nodes: int = 1
    groups: int | None = None
    recorded: tuple[int, ...] | None = None
    """What each expert of an MoE layer got when it was recorded: the start is planned from that."""
    backend: str = "none"
    """The all-to-all backend of SGLang."""
    dispatch: str = "lp"
    """SGLang's `--ep-dispatch-algorithm` with such a backend."""
    own_tokens: bool = True
    """Whether each rank has its own tokens."""
    failing_rank: int | None = None
    """The rank whose planner raises at the second rebalance."""


@dataclasses.dataclass
class Outcome:
    """What one rank saw; plain values, since they go to another process."""

    start: list[list[int]]
    """The map that SGLang starts with."""
    maps: list[list[list[int]]]
    """The map that each rebalance but the last one led to, at the end of its interval."""
    reports: list[dict[str, object]]
    failures: int
    wrong_rows: int
    checked_rows: int
    dense_row_changed: bool
    recorded: list[list[int]]
    """The load of each snapshot that the planner was given, flattened."""
    expected: list[list[int]]
    """The same from the tokens themselves."""


@dataclasses.dataclass
class Static:
    """What one rank saw of the dispatch `static`."""

    reported: list[float]
    """Balancedness of each interval but the first, as reported."""
    counted: list[float]
    """The same from the tokens that SGLang sent to each slot of each rank."""
    even: list[float]
    """The same if all replicas of an expert got the same."""
    wrong_tokens: int = 0
    """Choices whose slot holds another expert."""
    table: str | None = None
    """Whose table it was."""
    near: int = 0
    """Choices on the rank itself, of those with a replica there."""
    far: int = 0
    """The others of those."""
    moves: int = 0
    failures: int = 0


@dataclasses.dataclass
class Split:
    """What one rank saw of the dispatch."""

    chosen: list[list[list[list[int]]]]
    """The slot of each token of each step, [layers, tokens, top_k]."""
    tokens: int = 0
    wrong_tokens: int = 0
    """Choices whose slot holds another expert."""
    wrong_slots: int = 0
    """Slots of a layer and step with other loads, over all ranks, than `balance_batch` says."""
    wrong_rows: int = 0
    moves: int = 0
    failures: int = 0
