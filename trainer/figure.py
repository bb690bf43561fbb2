"""What all figures of the report share: palette, style, axes, and how one becomes an `<svg>`.

Text stays text and colors become CSS variables, so that the page sets the fonts and a dark scheme
recolors the figures. Every figure carries its own id prefix and nothing random: equal numbers
give equal text.
"""

import io
import re
from collections.abc import Callable, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

LIGHT = {
    "ink": "#1c2430",
    "muted": "#66707e",
    "line": "#dde2e9",
    "blue": "#2a6fb8",
    "pale": "#a9c8e6",
    "orange": "#cf6f1b",
    "green": "#2e8560",
    "red": "#c23b3b",
}
"""Colors of the figures by CSS variable, on a light page."""

DARK = {
    "ink": "#e7ebf1",
    "muted": "#9aa5b3",
    "line": "#343d49",
    "blue": "#6cabea",
    "pale": "#3d6388",
    "orange": "#eb9a52",
    "green": "#5dba91",
    "red": "#ee7d7d",
}
"""The same variables on a dark page."""

STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 8.5,
    "text.color": LIGHT["ink"],
    "axes.edgecolor": LIGHT["muted"],
    "axes.labelcolor": LIGHT["muted"],
    "axes.labelsize": 8,
    "axes.titlesize": 8.5,
    "axes.titlecolor": LIGHT["ink"],
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": LIGHT["line"],
    "grid.linewidth": 0.6,
    "xtick.color": LIGHT["muted"],
    "ytick.color": LIGHT["muted"],
    "xtick.major.size": 2.5,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "legend.handlelength": 1.6,
    "legend.columnspacing": 1.4,
    "lines.linewidth": 1.4,
}

FULL = 10.4
"""Width in inches of a figure across the page."""
HALF = 5.1
"""Width in inches of a figure beside another one."""
MAX_BUCKETS = 600
"""Longer curves are drawn by the least and the greatest value of that many buckets."""

Curve = tuple[Sequence[float], Sequence[float]]
"""Steps and the values at them."""


def render(name: str, size: tuple[float, float], draw: Callable[[Figure], None]) -> str:
    """Run `draw` on an empty figure of `size` inches and return its `<svg>` element."""
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        buffer = io.StringIO()
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'<svg ([^>]*?)\s*(width|height)="[^"]*"', r"<svg \1", text)
    text = re.sub(r'<svg ([^>]*?)\s*(width|height)="[^"]*"', r"<svg \1", text)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    for variable, color in LIGHT.items():
        text = text.replace(color, f"var(--{variable})")
    return text.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1)


def stand_alone(svg: str) -> str:
    """Return an `<svg>` element of `render` as a file of its own, on a light page."""
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    style = ";".join(f"--{variable}:{color}" for variable, color in LIGHT.items())
    font = "font-family:sans-serif;background:#ffffff"
    return svg.replace("<svg ", f'<svg {names} style="{style};{font}" ', 1)


def draw_line(axes: Axes, curve: Curve, color: str, width: float = 1.4, label: str = "") -> None:
    """Plot a curve, with dots where it has so few points that a line alone may not show them."""
    steps, values = _thinned(curve)
    marker = "." if len(steps) <= 20 else ""
    axes.plot(steps, values, marker=marker, color=color, linewidth=width, label=label or None)


def mark_steps(axes: Axes) -> None:
    axes.set_xlabel("optimizer step")
    axes.margins(x=0.01)
    axes.xaxis.set_major_locator(
        MaxNLocator(8, integer=True, min_n_ticks=1, steps=[1, 2, 2.5, 5, 10])
    )
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def use_log_if_wide(axes: Axes, values: Sequence[float]) -> None:
    """Use a logarithmic axis where the largest positive value is 20 times the median."""
    positive = [value for value in values if value > 0]
    if len(positive) == len(values) > 0 and max(positive) > 20 * float(np.median(positive)):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    else:
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(MaxNLocator(4))


def percent_ticks() -> PercentFormatter:
    return PercentFormatter(1, decimals=0, symbol="\N{NO-BREAK SPACE}%")


def put_legend_above(axes: Axes, columns: int = 4) -> None:
    """Put the legend over the axes, where it covers no data."""
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.2, borderpad=0.2
    )


def _thinned(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    """Keep a long curve's extremes per bucket, so that no outlier is lost and the file is small."""
    steps, values = np.asarray(curve[0], dtype=float), np.asarray(curve[1], dtype=float)
    if len(steps) <= 2 * MAX_BUCKETS:
        return steps, values
    kept: set[int] = {0, len(steps) - 1}
    for bucket in np.array_split(np.arange(len(steps)), MAX_BUCKETS):
        kept |= {int(bucket[values[bucket].argmin()]), int(bucket[values[bucket].argmax()])}
    order = sorted(kept)
    return steps[order], values[order]
