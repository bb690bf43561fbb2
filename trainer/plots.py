"""Figures of the report as inline SVG: plain numbers in, one `<svg>` element out.

Text stays text and colors become CSS variables, so that the page sets the fonts and a dark scheme
recolors the figures. Every figure carries its own id prefix and nothing random: equal numbers
give equal text.
"""

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator, PercentFormatter

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


def loss_curve(train: Curve, val: Curve, skipped: Sequence[float]) -> str:
    """Draw the training loss, raw and smoothed, the validation loss and the skipped steps."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        _line(axes, train, color=LIGHT["pale"], width=0.8, label="training")
        if len(train[0]) >= 10:
            smooth = (train[0], _smoothed(train[1]))
            _line(axes, smooth, color=LIGHT["blue"], label="training, smoothed")
        if len(val[0]):
            size = 4.5 if len(val[0]) <= 60 else 2
            axes.plot(*val, "o", markersize=size, color=LIGHT["orange"], label="validation")
        _mark_skipped(axes, skipped)
        _step_axis(axes)
        axes.set_ylabel("loss (nats per token)")
        _cut_start(axes, train[1])
        _legend_above(axes)

    return _render("loss", (FULL, 3.5), draw)


def optimizer_curves(lr: Curve, grad_norm: Curve) -> str:
    """Draw the learning rate above the gradient norm."""

    def draw(figure: Figure) -> None:
        upper, lower = figure.subplots(2, 1, sharex=True)
        _line(upper, lr, color=LIGHT["green"])
        upper.set_ylabel("learning rate")
        upper.set_ylim(bottom=0)
        upper.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
        upper.yaxis.set_major_formatter(FuncFormatter(_exponential))
        _line(lower, grad_norm, color=LIGHT["blue"], width=0.9)
        lower.set_ylabel("gradient norm")
        _log_if_wide(lower, grad_norm[1])
        _step_axis(lower)
        figure.align_ylabels()

    return _render("optimizer", (HALF, 3.2), draw)


def throughput_curve(tokens_per_second: Curve, warmup_until: float, median: float | None) -> str:
    """Draw tokens per second over the steps; those before `warmup_until` are shaded."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        first = tokens_per_second[0][0]
        axes.axvspan(first, warmup_until, color=LIGHT["line"], label="warm-up, left out")
        _line(axes, tokens_per_second, color=LIGHT["blue"], width=0.9)
        if median is not None:
            axes.axhline(median, color=LIGHT["orange"], linestyle="--", label="median")
        axes.set_ylim(bottom=0)
        axes.set_ylabel("tokens per second")
        axes.yaxis.set_major_formatter(EngFormatter())
        _step_axis(axes)
        _legend_above(axes)

    return _render("throughput", (HALF, 3.2), draw)


def time_bars(kinds: Sequence[dict[str, Any]]) -> str:
    """Draw the share of time beside the share of FLOPs of every kind of work, largest first."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        rows = np.arange(len(kinds))
        time = [kind["time_share"] or 0.0 for kind in kinds]
        flops = [kind["flops_share"] or 0.0 for kind in kinds]
        axes.barh(rows - 0.2, time, 0.36, color=LIGHT["blue"], label="share of time")
        axes.barh(rows + 0.2, flops, 0.36, color=LIGHT["orange"], label="share of model FLOPs")
        for row, kind in enumerate(kinds):
            text = f"{1e3 * kind['seconds_per_step']:,.3g} ms"
            if kind["mfu"] is not None:
                text += f", {100 * kind['mfu']:.1f} % of peak"
            end = max(time[row], flops[row])
            axes.annotate(
                text, (end, row), (5, 0), textcoords="offset points", va="center", fontsize=8
            )
        axes.set_yticks(rows, [kind["kind"].replace("_", " ") for kind in kinds])
        axes.tick_params("y", labelcolor=LIGHT["ink"])
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlim(0, 1.28 * max([0.1, *time, *flops]))
        axes.xaxis.set_major_formatter(_percent_ticks())
        axes.set_xlabel("share of one step")
        _legend_above(axes)

    return _render("time", (FULL, 1.1 + 0.42 * len(kinds)), draw)


def spikes_by_layer(entries: Sequence[dict[str, Any]], published: dict[str, Any]) -> str:
    """Draw sparsity (both readings), mean spikes and silent share by layer against `published`.

    Dots are single projections, lines the mean of a layer; `published` holds the values for k = 3.
    """
    panels = [
        ("Sparsity at 3 time steps", "sparsity_3_steps", ["sparsity_all", "sparsity_within_7"]),
        ("Mean spikes per channel", "mean_spikes", ["mean_spikes"]),
        ("Silent channels", "share_silent", ["share_silent"]),
    ]
    readings = {"sparsity_all": "over all counts", "sparsity_within_7": "over counts up to 7"}

    def draw(figure: Figure) -> None:
        for axes, (title, reference, keys) in zip(figure.subplots(1, 3), panels, strict=True):
            axes.axhline(
                published[reference], color=LIGHT["muted"], linestyle="--", linewidth=1,
                label="published, k = 3",
            )  # fmt: skip
            for key, color in zip(keys, [LIGHT["blue"], LIGHT["orange"]], strict=False):
                _layer_line(axes, entries, key, color, readings.get(key, "measured"))
            axes.set_title(title, pad=34, fontweight="bold")
            axes.set_xlabel("layer")
            axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
            if key != "mean_spikes":
                axes.yaxis.set_major_formatter(_percent_ticks())
            axes.margins(y=0.15)
            _legend_above(axes, columns=2)

    return _render("spikes", (FULL, 3.3), draw)


def count_histogram(shares: Sequence[float]) -> str:
    """Draw the shares of |count| = 0, 1, ... with the last bar for all larger counts."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        last = len(shares) - 1
        colors = [LIGHT["green"]] + [LIGHT["blue"]] * 7 + [LIGHT["orange"]] * (last - 7)
        axes.bar(range(len(shares)), shares, 0.78, color=colors[: len(shares)])
        for label, color in (
            ("silent", "green"),
            ("1 to 7: three bits", "blue"),
            ("above 7", "orange"),
        ):
            axes.bar([0], [0], color=LIGHT[color], label=label)
        axes.set_xticks(range(len(shares)), [str(n) for n in range(last)] + [f"{last}+"])
        axes.grid(visible=False, axis="x")
        axes.yaxis.set_major_formatter(_percent_ticks())
        axes.set_xlabel("absolute spike count")
        axes.set_ylabel("share of channels")
        _legend_above(axes)

    return _render("counts", (HALF, 3.1), draw)


def spike_trade_off(spikes: dict[str, Any]) -> str:
    """Draw sparsity against the share of counts up to 7: published by k, simulated, measured."""
    shares = "share_within_7"

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        points = spikes["reference"]["trade_off"]
        x = [point["sparsity_3_steps"] for point in points]
        axes.plot(
            x, [point[shares] for point in points], "--", marker="o", markersize=3.5,
            color=LIGHT["muted"], linewidth=1, label="published by k",
        )  # fmt: skip
        for point in points:
            _beside(axes, f"{point['k']:g}", point["sparsity_3_steps"], point[shares])
        for marker, inputs in (("s", "standard normal"), ("^", "Laplace")):
            rows = [row for row in spikes["check"] if row["inputs"] == inputs]
            axes.plot(
                [row["sparsity_within_7"] for row in rows], [row[shares] for row in rows], marker,
                markersize=4.5, color=LIGHT["green"], label=f"{inputs}, simulated",
            )  # fmt: skip
            for row in rows:
                _beside(axes, f"{row['k']:g}", row["sparsity_within_7"], row[shares])
        model = spikes["model"]
        ours = [model["sparsity_all"], model["sparsity_within_7"]], [model[shares]] * 2
        axes.plot(*ours, color=LIGHT["orange"])
        axes.plot(ours[0][1], ours[1][1], "o", color=LIGHT["orange"], label="this run")
        _beside(axes, f"{spikes['k']:g}", ours[0][1], ours[1][1])
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
            axis.set_major_formatter(_percent_ticks())
        axes.margins(0.1)
        axes.set_xlabel("sparsity at 3 time steps")
        axes.set_ylabel("counts up to 7")
        _legend_above(axes, columns=2)

    return _render("tradeoff", (HALF, 3.1), draw)


def _beside(axes: Axes, text: str, x: float, y: float) -> None:
    axes.annotate(text, (x, y), (6, -7), textcoords="offset points", fontsize=7.5)


def _layer_line(
    axes: Axes, entries: Sequence[dict[str, Any]], key: str, color: str, label: str
) -> None:
    """Plot each projection as a dot and the mean of each layer as a line."""
    layers = np.array([entry["layer"] for entry in entries])
    values = np.array([entry[key] for entry in entries], dtype=float)
    axes.plot(layers, values, "o", markersize=2.6, color=color, alpha=0.45, markeredgewidth=0)
    found = np.unique(layers)
    means = [values[layers == layer].mean() for layer in found]
    axes.plot(found, means, color=color, marker="o", markersize=3.2, label=label)


def _smoothed(values: Sequence[float]) -> list[float]:
    """Centered mean over a fortieth of the curve, over less towards its ends: it does not lag."""
    positions = np.arange(len(values))
    half = np.minimum(max(2, len(values) // 80), np.minimum(positions, positions[::-1]))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    means = (sums[positions + half + 1] - sums[positions - half]) / (2 * half + 1)
    return list(means)


def _line(axes: Axes, curve: Curve, color: str, width: float = 1.4, label: str = "") -> None:
    """Plot a curve, with dots where it has so few points that a line alone may not show them."""
    steps, values = _thinned(curve)
    marker = "." if len(steps) <= 20 else ""
    axes.plot(steps, values, marker=marker, color=color, linewidth=width, label=label or None)


def _cut_start(axes: Axes, losses: Sequence[float]) -> None:
    """Let the loss after the first fiftieth fill the axes of a long run, and say so."""
    late = losses[len(losses) // 50 :]
    if len(losses) >= 1000 and max(losses) > (top := max(late) + 0.3 * (max(late) - min(late))):
        axes.set_ylim(top=top)
        axes.text(
            0.99, 0.97, f"starts at {losses[0]:.3g}, above the axis", va="top", ha="right",
            transform=axes.transAxes, color=LIGHT["muted"], fontsize=8,
        )  # fmt: skip


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


def _mark_skipped(axes: Axes, skipped: Sequence[float]) -> None:
    if len(skipped):
        axes.plot(
            skipped, [0.03] * len(skipped), "x", transform=axes.get_xaxis_transform(),
            markersize=5, markeredgewidth=1.4, color=LIGHT["red"], label="skipped step",
        )  # fmt: skip


def _log_if_wide(axes: Axes, values: Sequence[float]) -> None:
    """Use a logarithmic axis where the largest positive value is 20 times the median."""
    positive = [value for value in values if value > 0]
    if len(positive) == len(values) > 0 and max(positive) > 20 * float(np.median(positive)):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    else:
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(MaxNLocator(4))


def _exponential(value: float, _: int) -> str:
    """Write 0.0003 as 3e-4."""
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}" if value else "0"


def _percent_ticks() -> PercentFormatter:
    return PercentFormatter(1, decimals=0, symbol="\N{NO-BREAK SPACE}%")


def _step_axis(axes: Axes) -> None:
    axes.set_xlabel("optimizer step")
    axes.margins(x=0.01)
    axes.xaxis.set_major_locator(
        MaxNLocator(8, integer=True, min_n_ticks=1, steps=[1, 2, 2.5, 5, 10])
    )
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _legend_above(axes: Axes, columns: int = 4) -> None:
    """Put the legend over the axes, where it covers no data."""
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.2, borderpad=0.2
    )


def _render(name: str, size: tuple[float, float], draw: Callable[[Figure], None]) -> str:
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
