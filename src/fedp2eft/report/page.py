"""The page of a run or comparison: one HTML file that makes no network requests."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure

from fedp2eft.federation.server.faults import MEANING
from fedp2eft.report import charts
from fedp2eft.report.facts import costs, facts, fault_counts, left_out
from fedp2eft.report.small import client_chart, highest_bar, language_chart, span_of
from fedp2eft.report.source import ReportData, TrainingLog
from fedp2eft.report.structure import grid_of, kept_by_language, likeness
from fedp2eft.report.svg import inline
from fedp2eft.results.figures import MARKS, STYLE, gain_span, look_of, shade
from fedp2eft.results.gains import judged, signed
from fedp2eft.results.layout import (
    MINUS,
    Table,
    choice_table,
    choice_texts,
    language_table,
    long_table,
    notes,
)
from fedp2eft.results.metrics import METRICS
from fedp2eft.settings.reading import settings_text

MOST_CLIENTS, MOST_ROWS, MOST_FAULTS = 40, 8, 500
"""What a page shows of generations (clients in all, rows each) and of faults; it says so."""


MARKS_AS_TEXT = dict(zip(MARKS, "●■◆▲▼✚✖★◀▶⬢♦⬟⬤⬡", strict=True))


@dataclass(frozen=True)
class Panel:
    """A figure with what it is shown under."""

    svg: Markup
    title: str
    method: int | None = None


@dataclass
class ScoreSection:
    """All that is about one base and pool."""

    base: str
    pool: str
    table: Any
    languages: Any
    accuracy: Panel
    difference: Panel | None
    bars: list[Panel] = field(default_factory=list)
    dots: list[Panel] = field(default_factory=list)


def page(report: ReportData, *, refresh: int = 0) -> str:
    """Return the page as HTML.

    Args:
        report: What to show.
        refresh: Seconds after which the page reloads itself; 0: never.
    """
    script = (files("fedp2eft.report") / "page.js").read_text(encoding="utf-8")
    style = (files("fedp2eft.report") / "page.css").read_text(encoding="utf-8")
    loader = PackageLoader("fedp2eft.report", "")
    # All text is escaped, but that marked as Markup: our own SVG, style and script.
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    with rc_context(STYLE):
        return environment.get_template("page.html").render(
            report=report,
            comparison=report.comparison,
            settings=report.settings,
            refresh=refresh,
            style=Markup(style),
            script=Markup(script),
            script_hash=base64.b64encode(sha256(script.encode()).digest()).decode(),
            facts=list(facts(report)),
            yaml=settings_text(report.settings),
            methods=_methods(report),
            ranks=[(rank, _css(shade(_ranks(report), rank))) for rank in _ranks(report)],
            gains=list(_gains(report)),
            choice_texts=choice_texts(report.comparison),
            choice_tables=[choice_table(choice) for choice in report.comparison.choices],
            scores=list(_scores(report)),
            notes=notes(report.comparison),
            structure=structure_data(report),
            likenesses=list(_likenesses(report)),
            structure_charts=_panels(charts.structure_charts(report.trainings)),
            training_charts=_panels(charts.training_charts(report.trainings)),
            costs=list(costs(report)),
            generations=list(generations(report)),
            faults=report.faults[-MOST_FAULTS:],
            fault_counts=fault_counts(report),
            meaning=MEANING,
            left_out=list(left_out(report)),
        )


def _ranks(report: ReportData) -> list[int]:
    return report.comparison.ranks


def _css(colour: tuple[float, float, float]) -> str:
    return "#" + "".join(f"{round(255 * part):02x}" for part in colour)


def _methods(report: ReportData) -> list[dict[str, Any]]:
    """Return the methods that have a score, with the colour of their marks."""
    ranked = {line.method: line.rank > 0 for line in report.comparison.lines}
    made = []
    for number, name in enumerate(report.comparison.methods):
        if name in ranked:
            look = look_of(number, name)
            mark = MARKS_AS_TEXT[look["marker"]] if ranked[name] else "┅"
            made.append({"number": number, "name": name, "colour": look["color"], "mark": mark})
    return made


def _scores(report: ReportData) -> Iterator[ScoreSection]:
    c = report.comparison
    for base in c.bases:
        for pool in c.pools:
            here = {line.method for line in c.lines if (line.base, line.pool) == (base, pool)}
            if not here:
                continue
            figure = charts.accuracy_panel(report, base, pool)
            title = f"{pool} clients" + (f", base {base}" if len(c.bases) > 1 else "")
            made = ScoreSection(
                base, pool, long_table(c, base, pool), language_table(c, base, pool),
                _panel(figure, title), _difference(report, base, pool, title),
            )  # fmt: skip
            points = charts.client_points(report, base, pool)
            highest, span = highest_bar(report, base, pool), span_of(points.values())
            for method in c.ordered(base, [pool]):
                if method == "base" or method not in here:
                    continue
                number = c.methods.index(method)
                bars = language_chart(report, base, pool, method, highest)
                made.bars.append(Panel(bars, method, number))
                if method in points:
                    dots = client_chart(report, method, points[method], span)
                    made.dots.append(Panel(dots, method, number))
            yield made


def _difference(report: ReportData, base: str, pool: str, title: str) -> Panel | None:
    """Draw paired differences to LoRA; None if nothing was compared with it."""
    lines = (line for line in report.comparison.lines if (line.base, line.pool) == (base, pool))
    if not any(found.to == "lora" for line in lines for found in line.differences):
        return None
    return _panel(charts.difference_panel(report, base, pool), title)


def _gains(report: ReportData) -> Iterator[dict[str, Any]]:
    """Yield where the gain comes from, per base and pool: sentences, figure and table."""
    several = len(report.comparison.bases) > 1
    widest = gain_span(report.comparison.gains)
    for gains in report.comparison.gains:
        metric = METRICS[gains.metric]
        title = f"{gains.pool} clients" + (f", base {gains.base}" if several else "")
        ranks = gains.ranks if len(gains.ranks) > 1 else []
        rows = [
            [step.name, f"{step.after} − {step.before}", judged(step, metric)]
            + [signed(step.by_rank[r].value, metric) if step.by_rank else "–" for r in ranks]
            for step in (*gains.steps, gains.total)
        ]
        head = ["step", "compares", "gain", *(f"r = {rank}" for rank in ranks)]
        table = Table(f"Gain per step, {title}", head, rows)
        yield {
            "text": gains.text,
            "panel": _panel(charts.gain_panel(gains, widest), title),
            "table": table,
        }


def _panel(figure: Figure, title: str) -> Panel:
    return Panel(inline(figure, title), title)


def _panels(made: Iterator[tuple[str, str, Figure]]) -> list[Panel]:
    return [_panel(figure, title) for _, title, figure in made]


def _asked(report: ReportData) -> Iterator[TrainingLog]:
    return (training for training in report.trainings if training.lambdas)


def structure_data(report: ReportData) -> list[dict[str, Any]]:
    """Return kept ranks for the heat map: by training, rank, language, module, layer."""
    found = []
    for training in _asked(report):
        assert training.lambdas is not None
        grid = grid_of(training.lambdas.layers)
        r_max = next(iter(training.lambdas.lam.values())).shape[1]
        ranks = {}
        budget = report.settings.evaluation.budget
        for rank, kept in kept_by_language(training.lambdas, _ranks(report), budget).items():
            ranks[str(rank)] = {
                name: [[_rounded(v) for v in row] for row in grid.spread(value)]
                for name, value in kept.items()
            }
        if ranks:
            found.append(
                {
                    "name": training.name or "this run",
                    "modules": grid.modules,
                    "layers": grid.layers,
                    "r_max": r_max,
                    "ranks": ranks,
                }
            )
    return found


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def _likenesses(report: ReportData) -> Iterator[dict[str, Any]]:
    for training in _asked(report):
        assert training.lambdas is not None
        names, alike = likeness(training.lambdas)
        if names:
            rows = [
                {"name": name, "cells": [_shaded(v) for v in row]}
                for name, row in zip(names, alike.tolist(), strict=True)
            ]
            yield {"training": training.name or "this run", "names": names, "rows": rows}


def _shaded(value: float) -> dict[str, str]:
    """Return a correlation with its colour: orange below 0, purple above, stronger with size."""
    hue = "var(--more)" if value >= 0 else "var(--less)"
    colour = f"color-mix(in srgb, {hue} {abs(value):.0%}, var(--back))"
    return {"text": f"{value:+.2f}".replace("-", MINUS), "colour": colour}


def generations(report: ReportData) -> Iterator[dict[str, Any]]:
    """Yield what the methods wrote, side by side: prompts × methods per training and client."""
    most = MOST_CLIENTS // max(1, len(report.generations)) or 1
    for training, found in report.generations.items():
        clients = [_client_texts(name, read) for name, read in list(found.items())[:most]]
        yield {"training": training or "this run", "clients": clients, "all": len(found)}


def _client_texts(name: str, read: list[dict[str, Any]]) -> dict[str, Any]:
    read = sorted(read, key=lambda one: (one.get("method") != "base", str(one.get("method")),
                                         int(one.get("rank") or 0)))  # fmt: skip
    heads = [_head(one) for one in read]
    prompts: dict[tuple[str, str], dict[str, str]] = {}
    for one, head in zip(read, heads, strict=True):
        for row in one["rows"]:
            key = (str(row.get("prompt", "")), str(row.get("reference", "")))
            prompts.setdefault(key, {})[head] = str(row.get("generated", ""))
    rows = [[*key, *(cells.get(h, "–") for h in heads)] for key, cells in prompts.items()]
    about = " · ".join(str(read[0][k]) for k in ("language", "pool") if read[0].get(k))
    shown = rows[:MOST_ROWS]
    return {"name": name, "about": about, "heads": heads, "rows": shown, "all": len(rows)}


def _head(one: dict[str, Any]) -> str:
    rank = one.get("rank")
    return str(one.get("method", "")) + (f" r={rank}" if rank else "")
