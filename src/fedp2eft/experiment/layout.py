"""What stands in the tables of a comparison, as text: rows and columns, no file format."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fedp2eft.experiment.statistics import Estimate
from fedp2eft.experiment.summary import REFERENCES, Comparison, Difference, Line

MISSING = "–"
NOTES = (
    "Accuracy in %: within a language pooled over its clients' test rows, then the plain mean of "
    "the languages. Worst language and worst client: the lowest of each seed. Worse than base: "
    "share of the clients that score below the base model itself.",
    "± is half the 95 % confidence interval over seeds (Student's t). [ ] is the 95 % interval of "
    "a paired bootstrap over clients, within languages.",
    "Seconds, parameters and kB (up and down, a client and round of the method's own federation) "
    "are means per client; memory is the most that the process held.",
    f"{MISSING}: not computed, or not defined.",
)


@dataclass(frozen=True)
class Table:
    """A table of text cells.

    Args:
        title: What it shows.
        head: Names of the columns.
        rows: Each as long as `head`.
    """

    title: str
    head: list[str]
    rows: list[list[str]]


def budgets(comparison: Comparison, base: str, pool: str) -> Iterator[tuple[int, str, Line | None]]:
    """(Rank, method, its line or None where there is none) in the order in which they are shown.

    A method without a budget comes again at every rank, to stand beside the others.
    """
    for rank in comparison.ranks:
        for method in comparison.methods:
            yield rank, method, comparison.line(base, pool, method, rank)


def compact_table(comparison: Comparison, base: str) -> Table:
    """Methods × (pool, rank): mean over languages with its interval over seeds."""
    at = [(pool, rank) for pool in comparison.pools for rank in comparison.ranks]

    def cell(method: str, pool: str, rank: int) -> str:
        line = comparison.line(base, pool, method, rank)
        if line is None:
            return MISSING
        few = "*" if len(line.mean.seeds) < len(comparison.seeds) else ""
        return percent(line.mean) + few

    rows = [[method, *(cell(method, *place) for place in at)] for method in comparison.methods]
    head = ["method", *(f"{pool} r={rank}" for pool, rank in at)]
    return Table(f"Accuracy on the base {base}", head, rows)


def long_table(comparison: Comparison, base: str, pool: str) -> Table:
    """(Rank, method) × all metrics, differences and costs of one pool."""
    names = list(columns(0))
    rows = []
    for rank, method, line in budgets(comparison, base, pool):
        cells = [show(line) if line else MISSING for show in columns(rank).values()]
        rows.append([str(rank), method, *cells])
    return Table(f"Base {base}, pool {pool}", ["rank", "method", *names], rows)


def language_table(comparison: Comparison, base: str, pool: str) -> Table:
    """(Rank, method) × languages of one pool: accuracy, mean over seeds."""
    languages = comparison.languages(base, pool)
    rows = []
    for rank, method, line in budgets(comparison, base, pool):
        made = [line.languages.get(name) if line else None for name in languages]
        cells = [f"{100 * one.mean:.1f}" if one else MISSING for one in made]
        rows.append([str(rank), method, *cells])
    return Table(
        f"Accuracy by language, base {base}, pool {pool}", ["rank", "method", *languages], rows
    )


def columns(rank: int) -> dict[str, Callable[[Line], str]]:
    """The long table's columns at a budget: name → what a line shows there."""
    return {
        "accuracy": lambda line: percent(line.mean),
        "worst language": lambda line: percent(line.worst_language),
        "worst client": lambda line: percent(line.worst_client),
        "worse than base": lambda line: percent(line.worse_than_base),
        **{f"to {to}": lambda line, to=to: points(line.difference(to, rank)) for to in REFERENCES},
        "seeds": lambda line: str(len(line.mean.seeds)),
        "seconds": lambda line: f"{line.cost.seconds:.1f}",
        "parameters": lambda line: f"{line.cost.parameters:,.0f}",
        "kB up": lambda line: f"{line.cost.bytes_up / 1e3:,.0f}",
        "kB down": lambda line: f"{line.cost.bytes_down / 1e3:,.0f}",
        "memory GB": lambda line: f"{line.cost.peak_memory / 1e9:.1f}",
    }


def percent(made: Estimate | None) -> str:
    """A share in %, with half its interval where it has one."""
    if made is None:
        return MISSING
    half = "" if made.half_width is None else f" ± {100 * made.half_width:.1f}"
    return f"{100 * made.mean:.1f}{half}"


def points(made: Difference | None) -> str:
    """A difference in percentage points, with its interval where it has one."""
    if made is None:
        return MISSING
    if made.low is None or made.high is None:
        return f"{100 * made.value:+.1f}"
    return f"{100 * made.value:+.1f} [{100 * made.low:+.1f}, {100 * made.high:+.1f}]"


def tables(comparison: Comparison) -> list[Table]:
    """Per base: the compact one first, then the long one and the languages of every pool."""
    return [
        table
        for base in comparison.bases
        for table in (
            compact_table(comparison, base),
            *(long_table(comparison, base, pool) for pool in comparison.pools),
            *(language_table(comparison, base, pool) for pool in comparison.pools),
        )
    ]


def notes(comparison: Comparison) -> list[str]:
    """What the reader of the tables must know."""
    seeds = ", ".join(map(str, comparison.seeds))
    lines = [*NOTES, f"Seeds: {seeds}. * fewer seeds than these."]
    if comparison.missing:
        lines.append(f"{len(comparison.missing)} cells of the comparison are not computed yet.")
    return lines
