"""What came of every fault, as a table on the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from eplb_plugin.runtime.rebalance import PHASES

PROPERTY = "fault"
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


def recorder(record_property: Callable[[str, object], None]) -> Record:
    """Keep rows with the report of the test that runs, which reaches the end from any worker."""

    def record(*args: Any, **values: Any) -> None:
        record_property(PROPERTY, asdict(Row(*args, **values)))

    return record


def show(rows: Iterable[Row], console: Console) -> None:
    for title, head, lines in _tables(rows):
        table = Table(title=title)
        for name in head:
            table.add_column(name)
        for line in lines:
            table.add_row(*line)
        console.print(table)


def markdown(rows: Iterable[Row]) -> str:
    parts = []
    for title, head, lines in _tables(rows):
        parts.append(f"{title}:\n")
        parts.append("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
        parts.append("\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n")
    return "\n".join(parts)


def _tables(rows: Iterable[Row]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, head and lines: faults in each phase, then those that happen in one place only."""
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
    return tables
