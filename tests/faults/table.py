"""What came of every fault, as a table on the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.faults.phases import PHASES

FAULT, SOAK = "fault", "soak"
Record = Callable[..., None]


@dataclass(frozen=True)
class Row:
    """The outcome of one fault.

    Attributes:
        fault: what happened to which rank.
        mode: of the rebalancer.
        phase: where; or what it was found by, for faults that belong to no phase of their own.
        placement: whether all ranks have one placement and the weights it says.
        outputs: whether they are those of one process; None where a rank is gone, so that there are none.
        seconds: until the ranks knew; until balancing worked again where it does.
        after: what the ranks do then.
    """

    fault: str
    mode: str
    phase: str
    placement: bool
    outputs: bool | None
    seconds: float
    after: str = "off"

    @property
    def cell(self) -> str:
        marks = {True: "yes", False: "NO", None: "-"}
        return f"{marks[self.placement]}, {marks[self.outputs]}, {self.after}, {self.seconds:.1f} s"


@dataclass(frozen=True)
class Use:
    """What one rank uses between two rebalances.

    Attributes:
        rss: resident memory, KiB.
        threads, files: of the process; files are descriptors.
        keys: in the store, over all ranks.
        stored: bytes of the store's file, 0 where it has none.
    """

    rss: int
    threads: int
    files: int
    keys: int
    stored: int


@dataclass(frozen=True)
class Soak:
    """A long run on one rank: what it used after the warm-up, and at the end."""

    name: str
    rank: int
    rebalances: int
    moving: int
    seconds: float
    first: Use
    last: Use

    @property
    def cells(self) -> list[str]:
        first, last = self.first, self.last
        return [
            self.name,
            str(self.rank),
            f"{self.rebalances} ({self.moving})",
            f"{self.seconds:.0f}",
            f"{first.rss / 1024:.1f} / {last.rss / 1024:.1f}",
            f"{first.threads} / {last.threads}",
            f"{first.files} / {last.files}",
            f"{first.keys} / {last.keys}",
            f"{first.stored / 1024:.0f} / {last.stored / 1024:.0f}",
        ]


def recorder(record_property: Callable[[str, object], None]) -> Record:
    """Keep rows with the report of the test that runs, which reaches the end from any worker."""

    def record(*args: Any, **values: Any) -> None:
        record_property(FAULT, asdict(Row(*args, **values)))

    return record


def show(rows: Iterable[Row], soaks: Sequence[Soak], console: Console) -> None:
    for title, head, lines in _tables(rows, soaks):
        table = Table(title=title)
        for name in head:
            table.add_column(name)
        for line in lines:
            table.add_row(*line)
        console.print(table)


def markdown(rows: Iterable[Row], soaks: Sequence[Soak]) -> str:
    parts = []
    for title, head, lines in _tables(rows, soaks):
        parts.append(f"{title}:\n")
        parts.append("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
        parts.append("\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n")
    return "\n".join(parts)


def _tables(rows: Iterable[Row], soaks: Sequence[Soak]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, head and lines: faults in each phase, those that happen in one place only, and long runs."""
    kept = sorted(set(rows), key=lambda row: (row.fault, row.mode, row.phase))
    cells = {(row.fault, row.mode, row.phase): row.cell for row in kept if row.phase in PHASES}
    lines = [
        [*key, *(cells.get((*key, phase), "") for phase in PHASES)]
        for key in dict.fromkeys(key[:2] for key in cells)
    ]
    tables = []
    what = "placement as its weights and alike on all, outputs those of one process, balancing then, seconds"
    if lines:
        tables.append((f"A fault in each phase: {what}", ["fault", "mode", *PHASES], lines))
    others = [row for row in kept if row.phase not in PHASES]
    if others:
        head = ["fault", "mode", "where", "outcome"]
        title = f"Faults that happen in one place: {what}"
        tables.append((title, head, [[row.fault, row.mode, row.phase, row.cell] for row in others]))
    if soaks:
        head = ["run", "rank", "rebalances (moving)", "s", "RSS MiB", "threads", "files", "keys", "store KiB"]
        title = "Long runs, after the warm-up / at the end"
        tables.append((title, head, [soak.cells for soak in sorted(soaks, key=lambda s: (s.name, s.rank))]))
    return tables
