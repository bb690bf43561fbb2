"""What a conversion did, per tensor and in sum: copied, transformed, new."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from models.causal_lm import CausalLM
from models.convert import Recipe

ORIGINS = ("copied", "transformed", "new")


@dataclass(frozen=True)
class TensorRow:
    name: str
    shape: list[int]
    origin: str
    """copied: bit for bit; transformed: an old one scaled or repeated; new."""
    parameters: int
    """0 for what training does not change."""
    sources: list[str]
    """Tensors of the old model that it is made of, or that decide where it begins."""
    kind: str
    """Of the part of the model that it belongs to."""


@dataclass(frozen=True)
class Conversion:
    """Every tensor of the new model."""

    rows: list[TensorRow]

    def summary(self) -> dict[str, dict[str, float]]:
        """Return parameters by origin and the new fraction, for each kind of part and in all."""
        kinds = dict.fromkeys([row.kind for row in self.rows]) | {"all": None}
        summary = {}
        for kind in kinds:
            counts = dict.fromkeys(ORIGINS, 0)
            for row in self.rows:
                if kind in (row.kind, "all"):
                    counts[row.origin] += row.parameters
            total = sum(counts.values())
            summary[kind] = counts | {"parameters": total, "new_fraction": counts["new"] / total}
        return summary

    def save(self, file: Path) -> None:
        """Write rows and summary as JSON."""
        rows = [asdict(row) for row in self.rows]
        file.write_text(json.dumps({"summary": self.summary(), "tensors": rows}, indent=1) + "\n")

    def summary_table(self) -> str:
        """Return the summary for a person."""
        head = ("part", "parameters", *ORIGINS, "new %")
        rows = []
        for kind, row in self.summary().items():
            counts = [f"{int(row[key]):,}" for key in head[1:-1]]
            rows.append((kind, *counts, f"{100 * row['new_fraction']:.3f}"))
        return _align([head, *rows], numbers_from=1)

    def tensor_table(self) -> str:
        """Return the rows for a person."""
        head = ("tensor", "shape", "origin", "from")
        rows = []
        for row in self.rows:
            sources = [] if row.sources == [row.name] else row.sources
            shape = "x".join(map(str, row.shape))
            rows.append((row.name, shape, row.origin, ", ".join(sources)))
        return _align([head, *rows])


def describe(recipes: dict[str, Recipe], model: CausalLM) -> Conversion:
    """Describe what `recipes` make of a model, which may be on the meta device."""
    parameters = {name: p.numel() for name, p in model.named_parameters()}
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    kinds = dict(_kinds(model))
    return Conversion(
        [
            TensorRow(
                name,
                list(tensors[name].shape),
                recipe.origin,
                parameters.get(name, 0),
                list(recipe.sources),
                kinds.get(".".join(name.split(".")[:3]), name.split(".")[0]),
            )
            for name, recipe in recipes.items()
        ]
    )


def _kinds(model: CausalLM) -> Iterator[tuple[str, str]]:
    """Yield the parts of each layer and their kind, norms with what they stand before."""
    for name, layer in model.named_layers():
        for part, module in (("mixer", layer.mixer), ("ffn", layer.ffn)):
            yield f"{name}.{part}", module.kind
            yield f"{name}.{part}_norm", module.kind


def _align(rows: Sequence[Sequence[str]], *, numbers_from: int | None = None) -> str:
    """Return rows as lines, with the columns from this one on aligned to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    first = len(widths) if numbers_from is None else numbers_from
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < first else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
