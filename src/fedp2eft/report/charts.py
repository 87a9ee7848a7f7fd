"""The figures that a page has beyond those of a comparison's tables. Needs matplotlib."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import MaxNLocator

from fedp2eft.methods import phases
from fedp2eft.report.small import Points
from fedp2eft.report.source import ReportData, TrainingLog
from fedp2eft.report.structure import Grid, Matrix
from fedp2eft.results.cells import scored, values
from fedp2eft.results.figures import (
    draw_accuracy,
    draw_differences,
    draw_gain,
    look_of,
    panels,
    shade,
)
from fedp2eft.results.gains import Gains
from fedp2eft.results.layout import unit


def panel(width: float = 3.4, height: float = 2.5) -> tuple[Figure, Axes]:
    """Return one small chart, sized for a phone's screen; inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def accuracy_panel(report: ReportData, base: str, pool: str) -> Figure:
    """Draw the mean over languages against the rank."""
    figure, ax = panel(3.8, 3.2)
    draw_accuracy(ax, report.comparison, base, pool)
    ax.set_ylabel(f"mean of languages ({unit(report.comparison.metric)})")
    return figure


def gain_panel(gains: Gains, span: tuple[float, float]) -> Figure:
    """Draw what each step gains on one pool; `span` holds the intervals of all pools."""
    figure, ax = panel(4.4, 0.75 + 0.36 * (len(gains.steps) + 1))
    draw_gain(ax, gains)
    ax.set_xlim(span)
    ax.tick_params(axis="y", labelsize=8)
    return figure


def difference_panel(report: ReportData, base: str, pool: str) -> Figure:
    """Draw paired differences to LoRA, best method on top; one mark per rank."""
    c = report.comparison
    methods = [name for name in c.ordered(base, [pool]) if name != "lora"]
    figure, ax = panel(4.4, 0.9 + 0.13 * len(methods) * (len(c.ranks) + 1))
    draw_differences(ax, c, base, pool, methods)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def client_points(report: ReportData, base: str, pool: str) -> dict[str, Points]:
    """Return every client's scores before and after, over all seeds, by method."""
    cells = [cell for cell in report.cells if (cell["base"], cell["pool"]) == (base, pool)]
    before = {cell["seed"]: values(cell) for cell in cells if cell["method"] == "base"}
    scale = 100.0 if report.comparison.metric.higher else 1.0
    found: dict[str, Points] = defaultdict(dict)
    for cell in cells:
        known = before.get(cell["seed"], {})
        if cell["method"] == "base" or not scored(cell):
            continue
        after = values(cell)
        found[cell["method"]].setdefault(cell["rank"], []).extend(
            (scale * known[name], scale * after[name]) for name in after if name in known
        )
    asked = set(report.comparison.methods)
    return {
        name: points for name, points in found.items() if name in asked and any(points.values())
    }


def _dots(points: Sequence[tuple[float, float]], colour: Any) -> PathPatch:
    """Return dots as one path, a tenth of the size of as many markers in an SVG."""
    vertices = [place for x, y in points for place in ((x, y), (x + 1e-3, y))]
    path = Path(vertices, [Path.MOVETO, Path.LINETO] * len(points))
    path.should_simplify = False
    return PathPatch(
        path, fill=False, edgecolor=colour, lw=4.5, capstyle="round", alpha=0.75, snap=False
    )


def clients_figure(report: ReportData, base: str, pool: str) -> Figure:
    """Draw a dot per client, before and after personalization; one panel per method."""
    points, ranks = client_points(report, base, pool), report.comparison.ranks
    every = [v for found in points.values() for pairs in found.values() for p in pairs for v in p]
    low, high = min(every), max(every)
    edge = 0.05 * (high - low) or 1.0
    figure, axes = panels(len(points), 2.5, 2.4, wide=min(4, len(points)), share_x=True)
    axes[0].set(xlim=(low - edge, high + edge), ylim=(low - edge, high + edge))
    for ax, (method, found) in zip(axes, points.items(), strict=True):
        for rank, pairs in sorted(found.items(), reverse=True):
            if rank in ranks or rank == 0:
                ax.add_patch(_dots(pairs, shade(ranks, rank)))
        ax.axline((low, low), slope=1, color="black", lw=0.8, ls="--")
        ax.set_title(method, fontsize=9)
    metric = unit(report.comparison.metric)
    figure.supxlabel(f"base model ({metric})", fontsize=9)
    figure.supylabel(f"personalized ({metric})", fontsize=9)
    figure.suptitle(
        f"Base {base}, pool {pool}: a dot per client, before and after; dark: high rank"
    )
    return figure


def structure_figure(
    grid: Grid, kept: Mapping[str, Matrix], rank: int, r_max: int, *, difference: bool = False
) -> Figure:
    """Draw kept ranks by module and layer: one panel per language, or its deviation."""
    mean = np.mean(list(kept.values()), axis=0)
    shown = {"mean of languages": mean, **kept}
    if difference:
        shown = {name: value - mean for name, value in kept.items()}
    figure = _grids(grid, shown, r_max, difference=difference)
    what = "less the mean of the languages" if difference else "mean over a language's clients"
    figure.suptitle(f"Ranks kept in each layer at r = {rank}: {what}")
    return figure


def overview_figure(grid: Grid, means: Mapping[int, Matrix], r_max: int) -> Figure:
    """Draw kept ranks by module and layer, averaged over languages: one panel per budget."""
    titled = {f"budget r = {rank}": value for rank, value in means.items()}
    figure = _grids(grid, titled, r_max)
    figure.suptitle(f"Where the ranks go: kept of {r_max} in each layer, mean over languages")
    return figure


def _grids(
    grid: Grid, shown: Mapping[str, Matrix], r_max: int, *, difference: bool = False
) -> Figure:
    """Draw panels of modules × layers on one colour scale."""
    most = max(0.5, *(float(np.abs(value).max()) for value in shown.values()))
    span: dict[str, Any] = {"vmin": 0, "vmax": min(r_max, most), "cmap": "Blues"}
    if difference:
        span = {"vmin": -most, "vmax": most, "cmap": "PuOr"}
    wide = min(4, len(shown))
    tall = -(-len(shown) // wide)
    width, height = 0.9 + 0.15 * len(grid.layers), 0.5 + 0.18 * len(grid.modules)
    figure = Figure(figsize=(wide * width + 2.0, tall * height + 0.6), layout="constrained")
    axes = list(figure.subplots(tall, wide, squeeze=False, sharex=True, sharey=True).ravel())
    for ax, (name, value) in zip(axes, shown.items(), strict=False):
        cells = np.array(grid.spread(value), dtype=float)
        drawn = ax.pcolormesh(cells, edgecolors="#e4e4e4", linewidth=0.3, **span)
        ax.set_title(name, fontsize=8)
        ax.tick_params(labelsize=7)
        ax.grid(False)
    axes[0].set_yticks(np.arange(len(grid.modules)) + 0.5, grid.modules)
    axes[0].invert_yaxis()
    step = 1 if len(grid.layers) <= 14 else 4
    axes[0].set_xticks(np.arange(0, len(grid.layers), step) + 0.5, grid.layers[::step])
    for ax in axes[len(shown) :]:
        ax.set_visible(False)
    figure.supxlabel("layer (–: outside the layers)", fontsize=8)
    figure.colorbar(drawn, ax=axes, shrink=0.8, pad=0.01, label="ranks")
    return figure


def likeness_figure(names: Sequence[str], alike: Matrix) -> Figure:
    """Draw the correlation between languages, in clustered order."""
    size = 1.8 + 0.28 * len(names)
    figure, ax = panel(size + 1.2, size)
    drawn = ax.pcolormesh(alike, vmin=-1, vmax=1, cmap="PuOr", edgecolors="white", linewidth=0.3)
    ax.set_yticks(np.arange(len(names)) + 0.5, names)
    ax.set_xticks(np.arange(len(names)) + 0.5, names, rotation=90)
    ax.invert_yaxis()
    ax.grid(False)
    figure.colorbar(drawn, ax=ax, label="correlation", shrink=0.8)
    figure.suptitle("Similarity of languages by λ, less what all share", fontsize=9)
    return figure


Series = dict[str, tuple[list[float], list[float]]]
"""Round and value by name of the line."""


def line_charts(charts: Mapping[str, Series]) -> Figure:
    """Draw lines of the same names over rounds: one chart per label, stacked."""
    tall = 2.5 if len(charts) == 1 else 1.4 * len(charts)
    figure = Figure(figsize=(3.4, tall), layout="constrained")
    axes = figure.subplots(len(charts), 1, squeeze=False, sharex=True)[:, 0]
    for ax, (label, series) in zip(axes, charts.items(), strict=True):
        for number, (name, (x, y)) in enumerate(series.items()):
            look = look_of(number, "") | {"marker": "o"}
            ax.plot(x, y, label=name, ms=2.5, lw=1.2, **look)
        ax.set_ylabel(label)
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes[-1].set_xlabel("round")
    figure.align_ylabels(axes)
    handles, names = axes[0].get_legend_handles_labels()
    if len(names) > 1:
        columns = 1 if max(map(len, names)) > 24 else 2
        figure.legend(
            handles, names, loc="outside lower center", ncols=columns, frameon=False, fontsize=7
        )
        figure.set_size_inches(3.4, tall + 0.14 * -(-len(names) // columns))
    return figure


def training_charts(trainings: Sequence[TrainingLog]) -> Iterator[tuple[str, str, Figure]]:
    """Yield (name, title, figure) of what metrics.jsonl holds per round, if anything."""
    wanted = (
        ("base-loss", "Base model: training loss", "loss", "base", "loss"),
        ("psg-loss", "PSG: distance of λ̂ from the λ of stage 1", "PSG loss", "psg", "psg-loss"),
        ("stage1-first", "Stage 1: loss at its first steps", "loss", "psg", "stage1-first"),
        ("stage1-last", "Stage 1: loss at its last steps", "loss", "psg", "stage1-last"),
        ("norm", "PSG: median length of a client's change", "norm", "psg", "norm"),
        *(
            (f"{name}-loss", f"{phase.title}: {metric.replace('-', ' ')}", "loss", name, metric)
            for name, phase in phases().items()
            for metric in phase.metrics[-1:]
        ),
        ("epsilon", "Privacy: ε spent", "ε", "psg", "epsilon"),
    )
    for name, title, label, phase, key in wanted:
        if found := _series(trainings, phase, key):
            yield name, title, line_charts({label: found})
    # The terms of stage 1's last loss, each on a scale of its own: they differ by magnitudes. Runs
    # of earlier versions did not keep them. Last, for it is taller than the others.
    terms = {
        term: _series(trainings, "psg", f"stage1-{term}")
        for term in ("task", "significance", "sparsity")
    }
    if all(terms.values()):
        yield "stage1-terms", "Stage 1: parts of the loss at its last steps", line_charts(terms)


def structure_charts(trainings: Sequence[TrainingLog]) -> Iterator[tuple[str, str, Figure]]:
    """Yield (name, title, figure) of what structure.json holds per round."""
    wanted = (
        ("level", "Mean λ̂", "λ̂"),
        ("spread", "Spread of λ̂ between the ranks of a client", "standard deviation / mean"),
        ("personal", "Spread of λ̂ of a rank between clients", "standard deviation / mean"),
    )
    for name, title, label in wanted:
        if found := _series(trainings, None, name):
            yield name, title, line_charts({label: found})
    overlap: Series = {}
    for training in trainings:
        for entry in training.structure:
            for rank, value in entry["overlap"].items():
                name = f"{training.name} r = {rank}".strip()
                x, y = overlap.setdefault(name, ([], []))
                x.append(entry["round"])
                y.append(100 * float(value))
    if overlap:
        title = "Kept ranks that two clients share (mean over pairs)"
        yield "overlap", title, line_charts({"%": overlap})


def _series(trainings: Sequence[TrainingLog], phase: str | None, key: str) -> Series:
    """Return one metric of a phase's rounds, or of structure.json."""
    found: Series = {}
    for training in trainings:
        entries = training.rounds.get(phase, []) if phase else training.structure
        points = [(e["round"], e[key]) for e in entries if isinstance(e.get(key), int | float)]
        if points:
            found[training.name or key] = ([p[0] for p in points], [p[1] for p in points])
    return found
