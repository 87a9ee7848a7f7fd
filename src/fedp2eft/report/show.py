"""The essentials of a run or comparison in the terminal."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from fedp2eft.errors import visible
from fedp2eft.report.facts import costs, facts, fault_counts
from fedp2eft.report.source import read_report
from fedp2eft.results.layout import Table, compact_table, language_table


def show_report(folder: str) -> None:
    """Print where the gain comes from, what was run, what is missing, the scores and the cost.

    Raises:
        UserError: There is no such folder, or no run in it.
    """
    report = read_report(folder, ask=False)
    c = report.comparison
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(_plain(f"{'Run' if report.single else 'Comparison'} {report.folder}"))
    for gains in c.gains:
        of = f"Base {gains.base}. " if len(c.bases) > 1 else ""
        console.print(_plain(f"{of}{gains.text}"))
    about = Grid.grid(padding=(0, 2))
    for row in facts(report):
        about.add_row(*map(_plain, row))
    console.print(about)
    for line in report.notes:
        console.print(_plain(f"! {line}"))
    for base in c.bases:
        pools = [p for p in c.pools if any((x.base, x.pool) == (base, p) for x in c.lines)]
        if pools:
            console.print(_grid(compact_table(c, base)))
        for pool in pools if report.single else ():
            console.print(_grid(language_table(c, base, pool)))
    if rows := list(costs(report)):
        head = ["training", "phase", "rounds", "seconds", "MB up", "MB down"]
        console.print(_grid(Table("Cost of training", head, rows)))
    if counts := fault_counts(report):
        said = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        console.print(_plain(f"Faults: {said}; see faults.jsonl."))


def _grid(table: Table) -> Grid:
    grid = Grid(title=_plain(table.title), title_justify="left")
    for name in table.head:
        grid.add_column(_plain(name), justify="left" if name in LEFT else "right")
    for row in table.rows:
        grid.add_row(*map(_plain, row))
    return grid


LEFT = ("method", "training", "phase")


def _plain(text: str) -> Text:
    """Text as it is, whatever rich would read into it."""
    return Text(visible(text), overflow="fold")
