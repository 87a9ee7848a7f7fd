"""`fedp2eft report` and `fedp2eft show`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fedp2eft.errors import UserError

NEEDED = ("matplotlib", "scipy")


def report(folder: str, out: str | None = None, figures: bool = False) -> None:
    """Write the report of a run or comparison, report.html.

    The report is one file that works offline. An unfinished run or comparison gets a report of what
    exists so far.

    Args:
        folder: The run or comparison folder.
        out: Folder for report.html and for report/. Default: `folder`.
        figures: Also write the figures as PNG and SVG into report/.
    """
    with extra_needed():
        from fedp2eft.report.write import FIGURES, write_report

    page, made = write_report(folder, out, figures=figures)
    for line in made.notes:
        print(f"Note: {line}")
    print(f"Page: {page} ({page.stat().st_size / 1e3:,.0f} kB)")
    if figures:
        print(f"Figures: {page.parent / FIGURES}")


def show(folder: str) -> None:
    """Print where the gain comes from, settings, progress and results of a run or comparison.

    Args:
        folder: The run or comparison folder.
    """
    from rich.table import Table as Grid

    from fedp2eft.commands.terminal import cell, console, table
    from fedp2eft.report.facts import costs, facts, fault_counts
    from fedp2eft.report.source import read_report
    from fedp2eft.results.layout import choice_texts, compact_table, gain_text, language_table

    # Where the gain comes from, what was run, and what is missing.
    found, out = read_report(folder, ask=False), console()
    c = found.comparison
    out.print(cell(f"{'Run' if found.single else 'Comparison'} {found.folder}"))
    for gains in c.gains:
        out.print(cell(gain_text(c, gains)))
    for text in choice_texts(c):
        out.print(cell(text))
    about = Grid.grid(padding=(0, 2))
    for row in facts(found):
        about.add_row(*map(cell, row))
    out.print(about)
    for line in found.notes:
        out.print(cell(f"! {line}"))
    # The scores.
    for base in c.bases:
        pools = [p for p in c.pools if any((x.base, x.pool) == (base, p) for x in c.lines)]
        shown = [compact_table(c, base)] if pools else []
        if found.single:
            shown += [language_table(c, base, pool) for pool in pools]
        for each in shown:
            out.print(table(each.title, each.head, each.rows))
    # What it cost, and what went wrong.
    if rows := list(costs(found)):
        head = ["training", "phase", "rounds", "seconds", "MB up", "MB down"]
        out.print(table("Cost of training", head, rows))
    if counts := fault_counts(found):
        said = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        out.print(cell(f"Faults: {said}; see faults.jsonl."))


@contextmanager
def extra_needed() -> Iterator[None]:
    """Turn a missing package into a `UserError` that names the extra `report`."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in NEEDED:
            raise
        raise UserError(
            "The report needs the extra report: pip install 'fedp2eft[report]'."
        ) from error
