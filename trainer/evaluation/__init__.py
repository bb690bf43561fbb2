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

from trainer.restore import Restored

Value = str | int | float | None


@dataclass(frozen=True)
class Evaluation:
    """The result of a suite.

    Attributes:
        suite: its name.
        rows: the lines of its table; all have the same keys.
        notes: definitions and assumptions that a reader of the table needs.
        figures: self-contained SVG by name.
    """

    suite: str
    rows: Sequence[Mapping[str, Value]]
    notes: Sequence[str] = ()
    figures: dict[str, str] = field(default_factory=dict)

    def table(self) -> str:
        """Return the rows and notes as text for a terminal."""
        table = Table(title=self.suite)
        for key in self.rows[0]:
            table.add_column(key, justify="right")
        for row in self.rows:
            table.add_row(*(_show(value) for value in row.values()))
        out = StringIO()
        Console(file=out, width=max(80, 16 * len(self.rows[0]))).print(table, *self.notes, sep="\n")
        return out.getvalue()

    def save(self, out: Path) -> None:
        """Write the rows and notes as JSON, and each figure beside them as <out>.<name>.svg."""
        out.parent.mkdir(parents=True, exist_ok=True)
        tree = {
            "suite": self.suite,
            "rows": [dict(row) for row in self.rows],
            "notes": list(self.notes),
        }
        out.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
        for name, svg in self.figures.items():
            out.with_suffix(f".{name}.svg").write_text(svg, encoding="utf-8")


class Suite(Protocol):
    """The config class of a suite."""

    def evaluate(self, restored: Restored) -> Evaluation:
        """Measure a restored model.

        Raises:
            ValueError: what the suite needs and the model or the data have not.
        """
        ...


def _show(value: Value) -> str:
    if isinstance(value, float):
        return f"{value:.4f}" if 1e-3 <= abs(value) < 1e5 or value == 0 else f"{value:.3e}"
    return f"{value:,}" if isinstance(value, int) else str(value if value is not None else "-")
