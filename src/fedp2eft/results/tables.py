"""The tables of a comparison: JSON, Markdown, CSV and LaTeX, from its cells alone."""

from __future__ import annotations

import csv
import html
import io
import logging
from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path

from fedp2eft.files import write_json, write_text
from fedp2eft.results.cells import read_cells
from fedp2eft.results.layout import MINUS, budgets, choice_texts, gain_text, notes, tables
from fedp2eft.results.metrics import METRICS
from fedp2eft.results.statistics import Estimate
from fedp2eft.results.summary import REFERENCES, Comparison, Line, summarize
from fedp2eft.settings.reading import settings_of_folder

_SHARES = ("mean", "worst_language", "worst_client", "worse_than_base")
_COSTS = ("steps", "seconds", "parameters", "bytes_up", "bytes_down", "peak_memory")
_log = logging.getLogger(__name__)


def write_tables(folder: str | Path) -> Comparison:
    """Write results.json, table.md, table.csv, table.tex and figures/ of a comparison folder.

    Writes are atomic. Without matplotlib there are no figures, and a
    warning says how to get them.

    Raises:
        UserError: The folder holds no comparison, or cannot be written.
    """
    folder = Path(folder)
    settings = settings_of_folder(folder)
    comparison = summarize(settings, read_cells(folder))
    write_json(folder / "results.json", asdict(comparison))
    write_text(folder / "table.md", markdown(comparison))
    write_text(folder / "table.csv", as_csv(comparison))
    write_text(folder / "table.tex", latex(comparison))
    try:
        from fedp2eft.results.figures import write_figures
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "matplotlib":
            raise
        _log.warning("Figures need matplotlib: pip install 'fedp2eft[report]', then compare again.")
    else:
        write_figures(comparison, folder / "figures")
    return comparison


def markdown(comparison: Comparison) -> str:
    """Return where the gain comes from, then all tables, in Markdown."""
    parts = []
    if comparison.gains:
        parts.append("## Where the gain comes from")
        parts += [_markdown_cell(gain_text(comparison, gains)) for gains in comparison.gains]
    if texts := choice_texts(comparison):
        parts.append("## What auto chose")
        parts += [_markdown_cell(text) for text in texts]
    for table in tables(comparison):
        head, *rows = [list(map(_markdown_cell, row)) for row in [table.head, *table.rows]]
        ruler = ["---"] * len(head)
        lines = ["| " + " | ".join(row) + " |" for row in (head, ruler, *rows)]
        parts.append("\n".join([f"## {table.title}", "", *lines]))
    return "\n\n".join([*parts, *notes(comparison)]) + "\n"


def _markdown_cell(text: str) -> str:
    """Escape text for Markdown: a method's or a language's name may hold HTML."""
    return html.escape(text, quote=False).replace("|", "\\|")


def latex(comparison: Comparison) -> str:
    """Return all tables in LaTeX; needs the package booktabs."""
    parts = ["% Needs \\usepackage{booktabs}."]
    for table in tables(comparison):
        labels = sum(name in ("rank", "method") for name in table.head)
        parts += [
            "\\begin{table}",
            "\\centering\\footnotesize\\setlength{\\tabcolsep}{3pt}",
            f"\\caption{{{escape(table.title)}}}",
            f"\\begin{{tabular}}{{{'l' * labels}{'r' * (len(table.head) - labels)}}}",
            "\\toprule",
            _latex_row(table.head),
            "\\midrule",
            *map(_latex_row, table.rows),
            "\\bottomrule",
            "\\end{tabular}",
            "\\end{table}",
            "",
        ]
    return "\n".join([*parts, *(f"% {line}" for line in notes(comparison))]) + "\n"


def _latex_row(cells: Sequence[str]) -> str:
    return " & ".join(map(escape, cells)) + " \\\\"


def escape(text: str) -> str:
    """Escape text for LaTeX."""
    special = {sign: f"\\{sign}" for sign in "&%$#_{}"} | {
        "\\": "\\textbackslash{}",
        "~": "\\textasciitilde{}",
        "^": "\\textasciicircum{}",
        "±": "$\\pm$",
        "–": "--",
        MINUS: "-",
        # other glyphs stand at these places of TeX's first font encoding
        "<": "\\textless{}",
        ">": "\\textgreater{}",
        "|": "\\textbar{}",
        # a row that begins with [ would be read as an option of the \\ before it
        "[": "{[}",
        "]": "{]}",
    }
    return "".join(special.get(sign, sign) for sign in text)


def as_csv(comparison: Comparison) -> str:
    """Return one row per (base, pool, rank, method) that the tables show; empty where missing.

    Shares, accuracies and scores of texts among them, are numbers from 0 to 1, losses are in nats
    per token, costs in optimizer steps, seconds and bytes.
    """
    metric = _column(comparison.metric.name)
    present = [line.further_means for line in comparison.lines]
    further = [name for name in METRICS if any(name in means for means in present)]
    places = list(product(comparison.bases, comparison.pools))
    languages = sorted({name for place in places for name in comparison.languages(*place)})
    head = (
        ["base", "pool", "rank", "method", "seeds", "clients"]
        + [f"{name}{end}" for name in _SHARES for end in ("", "_half_width")]
        + [f"to_{to}{end}" for to in REFERENCES for end in ("", "_low", "_high")]
        + [*_COSTS, *(f"{metric}_{name}" for name in languages), *map(_column, further)]
    )
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(head)
    for place in places:
        for rank, method, line in budgets(comparison, *place):
            values = _values(line, rank, languages, further) if line else []
            row = [*place, rank, method, *values]
            writer.writerow(row + [None] * (len(head) - len(row)))
    return out.getvalue()


def _column(name: str) -> str:
    return name.replace(" ", "_")


def _values(
    line: Line, rank: int, languages: Sequence[str], further: Sequence[str]
) -> list[float | None]:
    values: list[float | None] = [len(line.mean.seeds), line.clients]
    for name in _SHARES:
        made: Estimate | None = getattr(line, name)
        values += [made.mean, made.half_width] if made else [None, None]
    for to in REFERENCES:
        difference = line.difference(to, rank)
        values += [difference.value, difference.low, difference.high] if difference else [None] * 3
    values += [getattr(line.cost, name) for name in _COSTS]
    scores = [line.languages.get(name) for name in languages]
    scores += [line.further_means.get(name) for name in further]
    return values + [score.mean if score else None for score in scores]
