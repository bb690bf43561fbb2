"""What `longaxon evaluate` measures: a suite per file, named by conf/suites/<suite>.yaml.

A suite's file holds its strict config class, whose `evaluate` does the work.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.table import Table

from trainer.figure import stand_alone
from trainer.restore import Restored

Value = str | int | float | None

MOST_PRINTED = 40
"""Rows of a further table that a terminal shows."""


@dataclass(frozen=True)
class Evaluation:
    """The result of a suite.

    Attributes:
        suite: its name.
        rows: the lines of its table; all have the same keys.
        notes: definitions and assumptions that a reader of the table needs.
        figures: SVG of `trainer.figure` by name.
        tables: further rows by title; long tables are only saved.
    """

    suite: str
    rows: Sequence[Mapping[str, Value]]
    notes: Sequence[str] = ()
    figures: dict[str, str] = field(default_factory=dict)
    tables: Mapping[str, Sequence[Mapping[str, Value]]] = field(default_factory=dict)

    def table(self) -> str:
        """Return the rows and notes as text for a terminal."""
        out = StringIO()
        console = Console(file=out, width=max(80, 16 * len(self.rows[0])))
        for title, rows in ({self.suite: self.rows} | dict(self.tables)).items():
            if title == self.suite or len(rows) <= MOST_PRINTED:
                console.print(_lay_out(title, rows))
        for note in self.notes:  # on one line each: some are to be copied
            console.print(note, markup=False, highlight=False, soft_wrap=True)
        return out.getvalue()

    def save(self, out: Path) -> None:
        """Write the rows and notes as JSON, and each figure beside them as <out>.<name>.svg."""
        out.parent.mkdir(parents=True, exist_ok=True)
        tree = {
            "suite": self.suite,
            "rows": [dict(row) for row in self.rows],
            "notes": list(self.notes),
            "tables": {title: [dict(row) for row in rows] for title, rows in self.tables.items()},
        }
        out.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
        for name, svg in self.figures.items():
            out.with_suffix(f".{name}.svg").write_text(stand_alone(svg), encoding="utf-8")


class Suite(Protocol):
    """The config class of a suite."""

    def evaluate(self, restored: Restored) -> Evaluation:
        """Measure a restored model.

        Raises:
            ValueError: what the suite needs and the model or the data have not.
        """
        ...


def _lay_out(title: str, rows: Sequence[Mapping[str, Value]]) -> Table:
    table = Table(title=title)
    for key in rows[0]:
        table.add_column(key, justify="right")
    for row in rows:
        table.add_row(*(_show(value) for value in row.values()))
    return table


def _show(value: Value) -> str:
    if isinstance(value, float):
        return f"{value:.4f}" if 1e-3 <= abs(value) < 1e5 or value == 0 else f"{value:.3e}"
    return f"{value:,}" if isinstance(value, int) else str(value if value is not None else "-")
