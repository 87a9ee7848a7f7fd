"""Writes report.html, and the figures beside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from fedp2eft.files import write_text
from fedp2eft.report import charts
from fedp2eft.report.page import page
from fedp2eft.report.source import ReportData, read_report
from fedp2eft.report.structure import grid_of, kept_by_language, likeness
from fedp2eft.results.figures import STYLE, save_figures, write_figures

PAGE, FIGURES = "report.html", "report"


def write_report(
    folder: str | Path, out: str | Path | None = None, *, figures: bool = False
) -> tuple[Path, ReportData]:
    """Write the page of a run or comparison.

    Args:
        folder: The run or comparison folder.
        out: Where to. Default: `folder`.
        figures: Also write each figure as PNG and SVG into report/.

    Returns:
        The page, and what it shows.

    Raises:
        UserError: No such folder, no run in it, or it cannot be written.
    """
    report = read_report(folder)
    target = Path(out or folder).expanduser()
    write_text(target / PAGE, page(report))
    if figures:
        write_figures(report.comparison, target / FIGURES)
        with rc_context(STYLE):
            save_figures(figures_of(report), target / FIGURES)
    return target / PAGE, report


def figures_of(report: ReportData) -> dict[str, Figure]:
    """Return the figures that a comparison's tables do not already have, by name."""
    made: dict[str, Figure] = {}
    for base in report.comparison.bases:
        for pool in report.comparison.pools:
            if charts.client_points(report, base, pool):
                made[f"clients-{base}-{pool}"] = charts.clients_figure(report, base, pool)
    for training in report.trainings:
        if (found := training.lambdas) is None:
            continue
        end = f"-{training.name}" if training.name else ""
        grid, r_max = grid_of(found.layers), next(iter(found.lam.values())).shape[1]
        means = {}
        budget = report.settings.evaluation.budget
        for rank, kept in kept_by_language(found, report.comparison.ranks, budget).items():
            means[rank] = np.mean(list(kept.values()), axis=0)
            made[f"structure-r{rank}{end}"] = charts.structure_figure(grid, kept, rank, r_max)
            made[f"structure-difference-r{rank}{end}"] = charts.structure_figure(
                grid, kept, rank, r_max, difference=True
            )
        if means:
            made[f"structure{end}"] = charts.overview_figure(grid, means, r_max)
        names, alike = likeness(found)
        if names:
            made[f"likeness{end}"] = charts.likeness_figure(names, alike)
    for name, title, figure in (
        *charts.structure_charts(report.trainings),
        *charts.training_charts(report.trainings),
    ):
        figure.suptitle(title, fontsize=9)
        made[f"rounds-{name}"] = figure
    return made
