"""The figures of a comparison, as PNG and SVG. Needs matplotlib (extra `report`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedp2eft.files import write_whole
from fedp2eft.results.gains import Gains
from fedp2eft.results.layout import unit
from fedp2eft.results.metrics import METRICS, Metric
from fedp2eft.results.summary import Comparison, Line

# Okabe and Ito's colours, distinct with any colour vision; marks and lines distinguish rounds.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
LINES = ("-", ":", "-.")
MARKS = "osD^vPX*<>hdp8H"
KINDS = {1: COLOURS[0], 0: "#777777", -1: COLOURS[1]}
"""Colour of a gain, of no clear difference and of a loss."""
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "axes.axisbelow": True,
    "axes.titley": 1.0,  # else every drawing looks anew where a title has room
    "svg.hashsalt": "fedp2eft",  # else the names inside the file are drawn anew each time
    "svg.fonttype": "none",  # text stays text: small, and any script that the reader has a font for
    "text.parse_math": False,  # a name may hold $
}
_META: dict[str, dict[str, str | None]] = {"png": {"Software": None}, "svg": {"Date": None}}


def write_figures(comparison: Comparison, folder: Path) -> list[Path]:
    """Write every figure; the same comparison gives the same files, byte for byte.

    Returns:
        The files: for each base gain-<base>, accuracy-<base> and difference-<base>, and for each
        of its pools languages-<base>-<pool>, as .png and .svg; none of what has no cells.
    """
    written = []
    with rc_context(STYLE):
        for base in comparison.bases:
            lines = [line for line in comparison.lines if line.base == base]
            figures = {}
            if any(gains.base == base for gains in comparison.gains):
                figures[f"gain-{base}"] = gain_figure(comparison, base)
            if lines:
                figures[f"accuracy-{base}"] = accuracy_figure(comparison, base)
            if any(line.differences for line in lines):
                figures[f"difference-{base}"] = difference_figure(comparison, base)
            for pool in comparison.pools:
                if any(line.pool == pool and line.method != "base" for line in lines):
                    figures[f"languages-{base}-{pool}"] = language_figure(comparison, base, pool)
            written += save_figures(figures, folder)
    return written


def accuracy_figure(comparison: Comparison, base: str) -> Figure:
    """Draw the mean over languages against the rank, one panel per pool, intervals over seeds.

    The methods stand side by side within the band of their rank. A method without a budget is a
    dashed line. The axis shows the means; an interval may go beyond it.
    """
    figure, axes = panels(
        len(comparison.pools), 1.2 + 1.1 * len(comparison.ranks), 3.6, share_y=False, beside=2.2
    )
    for ax, pool in zip(axes, comparison.pools, strict=True):
        draw_accuracy(ax, comparison, base, pool)
        ax.set_title(pool)
    axes[0].set_ylabel(f"mean of languages ({unit(comparison.metric)})")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    name = comparison.metric.name
    figure.suptitle(f"{name.capitalize()} on the base {base}: mean over seeds, 95 % interval")
    return figure


def draw_accuracy(ax: Axes, comparison: Comparison, base: str, pool: str) -> None:
    """Draw one pool's panel of `accuracy_figure`; a method's marks have a gid `method-<n>-…`."""
    places, scale = np.arange(len(comparison.ranks)), _scale(comparison)
    spread = np.linspace(-0.36, 0.36, len(comparison.methods))
    for x in places:
        ax.axvspan(x - 0.42, x + 0.42, color="#f3f3f3", lw=0, zorder=0)
    for number, method in enumerate(comparison.methods):
        look = look_of(number, method)
        found = [comparison.line(base, pool, method, rank) for rank in comparison.ranks]
        lines = [(x, line) for x, line in zip(places, found, strict=True) if line]
        if lines and lines[0][1].rank == 0 < comparison.ranks[0]:
            level = scale * lines[0][1].mean.mean
            gid = f"method-{number}-level"
            ax.axhline(level, color=look["color"], lw=1.2, ls="--", gid=gid)
            ax.plot([], [], color=look["color"], lw=1.2, ls="--", label=method)
            continue
        drawn = ax.errorbar(
            [x + spread[number] for x, _ in lines],
            [scale * line.mean.mean for _, line in lines],
            yerr=[scale * (line.mean.half_width or 0) for _, line in lines],
            label=method,
            lw=1,
            ms=5,
            capsize=2,
            elinewidth=1,
            **look,
        )
        for part, artist in enumerate(drawn.get_children()):
            artist.set_gid(f"method-{number}-{part}")
        for bars in drawn[2]:
            bars.set_alpha(0.4)
    # Two or three seeds give intervals so long that nothing else could be read.
    means = [scale * line.mean.mean for line in comparison.lines if _is_of(line, base, pool)]
    if means:
        room = max(max(means) - min(means), 0.02 * abs(max(means)), 1e-3)
        ax.set_ylim(min(means) - 0.6 * room, max(means) + 0.6 * room)
    ax.grid(False, axis="x")
    ax.set_xticks(places, [str(rank) for rank in comparison.ranks])
    ax.set_xlabel("rank r")


def gain_figure(comparison: Comparison, base: str) -> Figure:
    """Draw where the gain comes from (`fedp2eft.results.gains`): one panel per pool."""
    found = [gains for gains in comparison.gains if gains.base == base]
    most = max(len(gains.steps) for gains in found) + 1
    figure, axes = panels(len(found), 3.6, 0.5 + 0.36 * most, share_y=False, beside=0.2)
    for ax, gains in zip(axes, found, strict=True):
        draw_gain(ax, gains)
        ax.set_title(f"{gains.pool} clients")
        ax.set_xlim(gain_span(found))
    figure.suptitle(f"Base {base}: what each step gains, 95 % paired bootstrap over clients")
    return figure


def gain_span(several: Sequence[Gains]) -> tuple[float, float]:
    """Return one scale for the intervals of several pools."""
    steps = [(gains, step) for gains in several for step in (*gains.steps, gains.total)]
    ends = [
        _scale(gains) * end
        for gains, step in steps
        for end in (0.0, step.gain, step.low, step.high)
        if end is not None
    ]
    low, high = min(ends, default=0.0), max(ends, default=1.0)
    edge = 0.05 * (high - low) or 1.0
    return low - edge, high + edge


def draw_gain(ax: Axes, gains: Gains) -> None:
    """Draw one pool's panel of `gain_figure`: blue gains, orange loses, grey is not clear."""
    steps = gains.steps if len(gains.steps) == 1 else (*gains.steps, gains.total)
    scale = _scale(gains)
    for row, step in enumerate(steps):
        look = {"color": KINDS[step.kind], "marker": "D" if step is gains.total else "o"}
        _interval(ax, row, step.gain, step.low, step.high, scale, look)
    if len(steps) > 1:
        ax.axhline(len(gains.steps) - 0.5, color="#999999", lw=0.6)
    names = [f"{step.after}\n− {step.before}" for step in steps]
    _rows(ax, names, f"gain ({_points(gains)});\nright of 0 is better")


def difference_figure(comparison: Comparison, base: str) -> Figure:
    """Draw each method's difference to LoRA, one panel per pool, with bootstrap intervals."""
    methods = [name for name in comparison.ordered(base) if name != "lora"]
    height = 1.2 + 0.16 * len(methods) * (len(comparison.ranks) + 1)
    figure, axes = panels(len(comparison.pools), 2.6, height, beside=1.6)
    for ax, pool in zip(axes, comparison.pools, strict=True):
        draw_differences(ax, comparison, base, pool, methods)
        ax.set_title(pool)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(f"Base {base}: paired difference to LoRA, 95 % bootstrap over clients")
    return figure


def draw_differences(
    ax: Axes, comparison: Comparison, base: str, pool: str, methods: Sequence[str]
) -> None:
    """Draw one pool's panel of `difference_figure`: one row per method, one mark per rank."""
    middle, scale = (len(comparison.ranks) - 1) / 2, _scale(comparison)
    step = 0.7 / max(1, len(comparison.ranks))
    for number, rank in enumerate(comparison.ranks):
        look = _look(number) | {"ls": "none"}
        for row, method in enumerate(methods):
            line = comparison.line(base, pool, method, rank)
            if found := line.difference("lora", rank) if line else None:
                place = row + (number - middle) * step
                _interval(ax, place, found.value, found.low, found.high, scale, look)
        ax.errorbar([], [], label=f"r = {rank}", ms=4, **look)
    for row in range(0, len(methods), 2):
        ax.axhspan(row - 0.5, row + 0.5, color="#f3f3f3", lw=0, zorder=0)
    _rows(ax, methods, f"to LoRA ({_points(comparison)})")


def _interval(
    ax: Axes, row: float, value: float, low: float | None, high: float | None, scale: float,
    look: Mapping[str, Any],
) -> None:  # fmt: skip
    """Draw a mark with its interval, if it has one."""
    ends = (
        [[scale * (value - low)], [scale * (high - value)]]
        if low is not None and high is not None
        else None
    )
    ax.errorbar([scale * value], [row], xerr=ends, lw=1.2, ms=4, capsize=2, **look)


def _rows(ax: Axes, names: Sequence[str], label: str) -> None:
    """Draw rows from above, with a line at 0."""
    ax.axvline(0, color="black", lw=0.8)
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_xlabel(label)
    ax.grid(False, axis="y")


def _points(judged: Comparison | Gains) -> str:
    """Return the unit of a difference."""
    metric = _metric(judged)
    return "points" if metric.higher else unit(metric)


def language_figure(comparison: Comparison, base: str, pool: str) -> Figure:
    """Draw the metric by language: one panel per method, one bar per rank, the base as a line.

    A method without a budget has one grey bar.
    """
    languages = comparison.languages(base, pool)
    methods = [method for method in comparison.methods if method != "base"]
    width, wide = 1.5 + 0.3 * len(languages), 2 if len(methods) > 1 else 1
    figure, axes = panels(len(methods), width, 1.6, wide=wide, share_x=True)
    for ax, method in zip(axes, methods, strict=True):
        draw_languages(ax, comparison, base, pool, method)
        ax.set_title(method, fontsize=9)
    for rank in comparison.ranks:
        axes[0].bar([0], [0], color=shade(comparison.ranks, rank), label=f"r = {rank}")
    axes[0].plot([], [], color="black", lw=1.4, label="base model")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.supylabel(f"{comparison.metric.name} ({unit(comparison.metric)})", fontsize=9)
    figure.suptitle(f"Base {base}, pool {pool}: by language, mean over seeds")
    return figure


def draw_languages(ax: Axes, comparison: Comparison, base: str, pool: str, method: str) -> None:
    """Draw one method's panel of `language_figure`."""
    languages = comparison.languages(base, pool)
    places = np.arange(len(languages))
    drawn, level = language_bars(comparison, base, pool, method)
    width = 0.8 / max(1, len(drawn))
    for number, (rank, values) in enumerate(drawn.items()):
        left = places - 0.4 + (number + 0.5) * width
        ax.bar(left, values, width, color=shade(comparison.ranks, rank))
    if level:
        ax.hlines(level, places - 0.45, places + 0.45, color="black", lw=1.4)
    ax.set_xticks(places, languages, rotation=90 if len(languages) > 8 else 0)
    ax.grid(False, axis="x")


def language_bars(
    comparison: Comparison, base: str, pool: str, method: str
) -> tuple[dict[int, list[float]], list[float]]:
    """Return a method's metric by rank and language, and the base model's by language.

    A method without a budget has one row, of rank 0; NaN is where a language has no number.
    """
    languages, scale = comparison.languages(base, pool), _scale(comparison)
    found = {rank: comparison.line(base, pool, method, rank) for rank in comparison.ranks}
    lines = {rank: line for rank, line in found.items() if line}
    if any(line.rank == 0 for line in lines.values()):
        lines = {0: next(iter(lines.values()))}
    rows = {
        rank: [scale * _value(line, name) for name in languages] for rank, line in lines.items()
    }
    known = comparison.line(base, pool, "base", comparison.ranks[0])
    return rows, [scale * _value(known, name) for name in languages] if known else []


def panels(
    count: int,
    width: float,
    height: float,
    *,
    wide: int | None = None,
    share_x: bool = False,
    share_y: bool = True,
    beside: float = 0.4,
) -> tuple[Figure, list[Axes]]:
    """Return a figure of so many panels, `wide` per row; inches, `beside` for what is beside."""
    wide = wide or count
    tall = -(-count // wide)
    size = (wide * width + beside, tall * height + 0.8)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(tall, wide, squeeze=False, sharex=share_x, sharey=share_y).ravel()
    for ax in grid[count:]:
        ax.set_visible(False)
    for ax in grid[max(0, count - wide) : count]:  # the lowest of each column
        ax.tick_params(labelbottom=True)
    return figure, list(grid[:count])


def look_of(number: int, method: str) -> dict[str, Any]:
    """Return what the n-th method is drawn with; the base model is black."""
    return _look(number) if method != "base" else {"color": "black"}


def _look(number: int) -> dict[str, Any]:
    """Return colour, mark and line of the n-th series."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKS[number % len(MARKS)],
        "ls": LINES[number // len(COLOURS) % len(LINES)],
    }


def shade(ranks: Sequence[int], rank: int) -> tuple[float, float, float]:
    """Return light to dark blue, so that lightness alone distinguishes ranks; grey for rank 0."""
    if rank == 0:
        return 0.6, 0.6, 0.6
    part = ranks.index(rank) / max(1, len(ranks) - 1)
    light, dark = np.array([0.55, 0.76, 0.92]), np.array([0.0, 0.27, 0.49])
    red, green, blue = (light + part * (dark - light)).tolist()
    return red, green, blue


def _is_of(line: Line, base: str, pool: str) -> bool:
    return (line.base, line.pool) == (base, pool)


def _value(line: Line, language: str) -> float:
    found = line.languages.get(language)
    return found.mean if found else float("nan")


def _scale(judged: Comparison | Gains) -> float:
    """Return the factor that shows shares in %."""
    return 100.0 if _metric(judged).higher else 1.0


def _metric(judged: Comparison | Gains) -> Metric:
    return METRICS[judged.metric] if isinstance(judged, Gains) else judged.metric


def laid_out(figure: Figure) -> Figure:
    """Return a figure whose parts have their places: laid out once, not twice for every file."""
    if engine := figure.get_layout_engine():
        engine.execute(figure)
        figure.set_layout_engine("none")
    return figure


def save_figures(figures: Mapping[str, Figure], folder: Path) -> list[Path]:
    """Write figures as .png and .svg into a folder; returns the files."""
    written = []
    for name, figure in figures.items():
        laid_out(figure)
        for kind, meta in _META.items():
            path = folder / f"{name}.{kind}"
            write_whole(path, partial(figure.savefig, format=kind, dpi=150, metadata=meta))
            written.append(path)
    return written
