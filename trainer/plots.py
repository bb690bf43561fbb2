"""Figures of the report as inline SVG: plain numbers in, one `<svg>` element out."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

from ops.spike import encode
from ops.spike.coding import CODINGS
from trainer.figure import (
    FULL,
    HALF,
    LIGHT,
    Curve,
    draw_line,
    mark_steps,
    percent_ticks,
    put_legend_above,
    render,
    use_log_if_wide,
)


def loss_curve(train: Curve, val: Curve, skipped: Sequence[float]) -> str:
    """Draw the training loss, raw and smoothed, the validation loss and the skipped steps."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        draw_line(axes, train, color=LIGHT["pale"], width=0.8, label="training")
        if len(train[0]) >= 10:
            smooth = (train[0], _smoothed(train[1]))
            draw_line(axes, smooth, color=LIGHT["blue"], label="training, smoothed")
        if len(val[0]):
            size = 4.5 if len(val[0]) <= 60 else 2
            axes.plot(*val, "o", markersize=size, color=LIGHT["orange"], label="validation")
        _mark_skipped(axes, skipped)
        mark_steps(axes)
        axes.set_ylabel("loss (nats per token)")
        _cut_start(axes, train[1])
        put_legend_above(axes)

    return render("loss", (FULL, 3.5), draw)


def optimizer_curves(lr: Curve, grad_norm: Curve) -> str:
    """Draw the learning rate above the gradient norm."""

    def draw(figure: Figure) -> None:
        upper, lower = figure.subplots(2, 1, sharex=True)
        draw_line(upper, lr, color=LIGHT["green"])
        upper.set_ylabel("learning rate")
        upper.set_ylim(bottom=0)
        upper.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
        upper.yaxis.set_major_formatter(FuncFormatter(_exponential))
        draw_line(lower, grad_norm, color=LIGHT["blue"], width=0.9)
        lower.set_ylabel("gradient norm")
        use_log_if_wide(lower, grad_norm[1])
        mark_steps(lower)
        figure.align_ylabels()

    return render("optimizer", (HALF, 3.2), draw)


def throughput_curve(tokens_per_second: Curve, warmup_until: float, median: float | None) -> str:
    """Draw tokens per second over the steps; those before `warmup_until` are shaded."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        first = tokens_per_second[0][0]
        axes.axvspan(first, warmup_until, color=LIGHT["line"], label="warm-up, left out")
        draw_line(axes, tokens_per_second, color=LIGHT["blue"], width=0.9)
        if median is not None:
            axes.axhline(median, color=LIGHT["orange"], linestyle="--", label="median")
        axes.set_ylim(bottom=0)
        axes.set_ylabel("tokens per second")
        axes.yaxis.set_major_formatter(EngFormatter())
        mark_steps(axes)
        put_legend_above(axes)

    return render("throughput", (HALF, 3.2), draw)


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
        axes.xaxis.set_major_formatter(percent_ticks())
        axes.set_xlabel("share of one step")
        put_legend_above(axes)

    return render("time", (FULL, 1.1 + 0.42 * len(kinds)), draw)


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
                axes.yaxis.set_major_formatter(percent_ticks())
            axes.margins(y=0.15)
            put_legend_above(axes, columns=2)

    return render("spikes", (FULL, 3.3), draw)


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
        axes.yaxis.set_major_formatter(percent_ticks())
        axes.set_xlabel("absolute spike count")
        axes.set_ylabel("share of channels")
        put_legend_above(axes)

    return render("counts", (HALF, 3.1), draw)


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
            axis.set_major_formatter(percent_ticks())
        axes.margins(0.1)
        axes.set_xlabel("sparsity at 3 time steps")
        axes.set_ylabel("counts up to 7")
        put_legend_above(axes, columns=2)

    return render("tradeoff", (HALF, 3.1), draw)


def spike_sweep(rows: Sequence[dict[str, Any]]) -> str:
    """Draw both sparsities against perplexity over that without spikes, by k of each row."""
    readings = (("sparsity_within_7", "blue", "within 7"), ("sparsity_all", "green", "all counts"))

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for key, color, label in readings:
            x, y = [row[key] for row in rows], [row["ratio"] for row in rows]
            axes.plot(x, y, marker="o", markersize=3.5, color=LIGHT[color], label=label)
            for row in rows:
                _beside(axes, row["k"], row[key], row["ratio"])
        axes.axvline(
            0.69, color=LIGHT["muted"], linestyle="--", linewidth=1, label="published, k = 3"
        )
        axes.xaxis.set_major_formatter(percent_ticks())
        axes.margins(0.1)
        axes.set_xlabel("sparsity at 3 time steps")
        axes.set_ylabel("perplexity, over that without spikes")
        put_legend_above(axes, columns=3)

    return render("sweep", (HALF, 3.1), draw)


def spike_raster(counts: Sequence[int], title: str) -> str:
    """Draw the spikes of a token's channels over time, a panel for each coding.

    Args:
        counts: of each channel; codings without a sign stand for their sizes.
        title: what the channels are.
    """
    count = torch.tensor(counts)
    trains = {
        coding: encode(count.abs() if coding in ("binary", "bitwise") else count, coding).numpy()
        for coding in CODINGS
    }
    names = {coding: coding.replace("_", "\n", 1).replace("_", " ") for coding in trains}

    def draw(figure: Figure) -> None:
        widths = [max(5, min(40, len(train))) for train in trains.values()]
        panels = figure.subplots(1, len(trains), sharey=True, width_ratios=widths)
        for axes, (coding, train) in zip(panels, trains.items(), strict=True):
            for sign, color in ((1, LIGHT["blue"]), (-1, LIGHT["orange"])):
                steps, channels = np.nonzero(train == sign)
                axes.plot(steps, channels, "|", markersize=3.2, markeredgewidth=1.2, color=color)
            axes.set_title(names[coding], fontsize=7.5)
            axes.set_xlim(-0.7, len(train) - 0.3)
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
            axes.grid(visible=False)
        panels[0].set_ylabel("channel")
        figure.supxlabel(f"time step ({title}; blue +1, orange -1)", fontsize=8)

    return render("raster", (FULL, 3.6), draw)


def expert_loads(layers: Sequence[dict[str, Any]]) -> str:
    """Draw a cell for each expert of each layer: orange with more than its share, blue with less.

    A cell is as strong as its load is away from the mean of the layer, on a scale of its own for
    more and for less, whose ends are the busiest expert of all and none.
    """
    rows = [np.array(layer["load"]) / max(1e-9, float(np.mean(layer["load"]))) for layer in layers]
    most, width = max(2.0, *(row.max() for row in rows)), max(len(row) for row in rows)

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for i, row in enumerate(rows):
            strength = np.where(row > 1, (row - 1) / (most - 1), 1 - row)
            for color, is_mine in ((LIGHT["orange"], row > 1), (LIGHT["blue"], row <= 1)):
                places = np.flatnonzero(is_mine)
                colors = [(color, round(float(strength[place]), 3)) for place in places]
                axes.bar(places, 0.9, 0.94, bottom=i - 0.45, color=colors)
            for place, load in enumerate(row if width <= 32 else ()):
                axes.text(place, i, f"{load:.2g}", ha="center", va="center", fontsize=7.5)
        axes.set_xlim(-0.6, width - 0.4)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_yticks(range(len(rows)), [f"layer {layer['layer']}" for layer in layers])
        axes.set_xticks(range(0, width, -(-width // 32)))
        axes.set_xlabel("expert")
        axes.grid(visible=False)

    return render("loads", (FULL, 0.8 + 0.26 * len(rows)), draw)


def routing_curves(curves: dict[str, Curve]) -> str:
    """Draw what metrics.jsonl says of the routers over the steps, a panel for each figure."""
    titles = {
        "router_max_load": "Busiest expert, over the mean",
        "router_entropy": "Entropy of the scores (nats)",
        "balance_loss": "Balance loss (1: even)",
        "router_drop_rate": "Dropped choices",
    }
    shown = {name: curve for name, curve in curves.items() if name in titles and any(curve[1])}

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, max(1, len(shown)), squeeze=False)[0]
        for axes, (name, curve) in zip(panels, shown.items(), strict=False):
            draw_line(axes, curve, color=LIGHT["blue"], width=0.9)
            axes.set_title(titles[name])
            axes.set_ylim(bottom=0)
            mark_steps(axes)
            if name == "router_drop_rate":
                axes.yaxis.set_major_formatter(percent_ticks())

    return render("routing", (FULL, 2.3), draw)


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


def _cut_start(axes: Axes, losses: Sequence[float]) -> None:
    """Let the loss after the first fiftieth fill the axes of a long run, and say so."""
    late = losses[len(losses) // 50 :]
    if len(losses) >= 1000 and max(losses) > (top := max(late) + 0.3 * (max(late) - min(late))):
        axes.set_ylim(top=top)
        axes.text(
            0.99, 0.97, f"starts at {losses[0]:.3g}, above the axis", va="top", ha="right",
            transform=axes.transAxes, color=LIGHT["muted"], fontsize=8,
        )  # fmt: skip


def _mark_skipped(axes: Axes, skipped: Sequence[float]) -> None:
    if len(skipped):
        axes.plot(
            skipped, [0.03] * len(skipped), "x", transform=axes.get_xaxis_transform(),
            markersize=5, markeredgewidth=1.4, color=LIGHT["red"], label="skipped step",
        )  # fmt: skip


def _exponential(value: float, _: int) -> str:
    """Write 0.0003 as 3e-4."""
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}" if value else "0"
