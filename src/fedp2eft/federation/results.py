"""Tables from cells: within a language pooled over its clients, then the plain mean of languages.

(Paper section 5, metric.)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedp2eft.errors import UserError
from fedp2eft.files import read_json, write_json


@dataclass(frozen=True)
class Row:
    """Scores of one method, budget and pool.

    Args:
        method: Its name.
        rank: Budget r; 0 for a method without one.
        pool: "seen", "unseen" or "new-language".
        languages: Accuracy by language, 0 to 1, pooled over the language's test rows.
        mean: Plain mean over languages.
        worst_language: Lowest accuracy of a language.
        worst_client: Lowest accuracy of a client.
        worse_than_base: Share of clients below the base model's own accuracy; None without it.
        clients: Clients scored.
        parameters: Mean number of adapter parameters of a client.
    """

    method: str
    rank: int
    pool: str
    languages: dict[str, float]
    mean: float
    worst_language: float
    worst_client: float
    worse_than_base: float | None
    clients: int
    parameters: float


@dataclass(frozen=True)
class Results:
    """All rows of a run.

    Args:
        run: The run folder.
        rows: Sorted by pool, rank and method as they were asked for.
    """

    run: Path
    rows: tuple[Row, ...]

    def row(self, method: str, rank: int, pool: str) -> Row:
        """One row; a `UserError` where it was not computed."""
        for row in self.rows:
            if (row.method, row.rank, row.pool) == (method, rank, pool):
                return row
        raise UserError(f"{self.run} has no result for {method}, rank {rank}, pool {pool}.")


def read_results(run: str | Path) -> Results:
    """The tables that `collect` wrote."""
    rows = read_json(Path(run) / "results.json")
    if not isinstance(rows, list):
        raise UserError(f"{run} has no results yet: finish the run first.")
    return Results(Path(run), tuple(Row(**row) for row in rows))


def collect(run: str | Path) -> Results:
    """Read a run's cells, write results.json and return the tables."""
    run = Path(run)
    groups: dict[tuple[str, int, str], list[dict[str, Any]]] = defaultdict(list)
    for path in sorted(run.glob("cells/*/*.json")):
        cell = read_json(path)
        if isinstance(cell, dict) and cell["examples"]:  # a client without test rows has no score
            method, _, rank = path.parent.name.rpartition("-r")
            groups[(method, int(rank), cell["pool"])].append(cell)
    base = {
        cell["client"]: cell["correct"] / cell["examples"]
        for (method, _, _), cells in groups.items()
        if method == "base"
        for cell in cells
    }
    rows = tuple(
        row_of(*key, groups[key], base) for key in sorted(groups, key=lambda k: (k[2], k[1], k[0]))
    )
    results = Results(run, rows)
    write_json(run / "results.json", [asdict(row) for row in rows])
    return results


def row_of(
    method: str,
    rank: int,
    pool: str,
    cells: Sequence[Mapping[str, Any]],
    base: Mapping[str, float],
) -> Row:
    """The scores of one method, budget and pool.

    Args:
        method: Its name.
        rank: Budget r; 0 for a method without one.
        pool: Whose clients.
        cells: For each client `client`, `language`, `examples` (above 0), `correct`, `parameters`.
        base: The base model's own accuracy by client, for those it is known for.
    """
    correct: dict[str, int] = defaultdict(int)
    total: dict[str, int] = defaultdict(int)
    for cell in cells:
        correct[cell["language"]] += cell["correct"]
        total[cell["language"]] += cell["examples"]
    languages = {name: correct[name] / total[name] for name in sorted(total)}
    each = {cell["client"]: cell["correct"] / cell["examples"] for cell in cells}
    known = [name for name in each if name in base]
    worse = sum(each[name] < base[name] for name in known)
    return Row(
        method=method,
        rank=rank,
        pool=pool,
        languages=languages,
        mean=sum(languages.values()) / len(languages),
        worst_language=min(languages.values()),
        worst_client=min(each.values()),
        worse_than_base=worse / len(known) if known else None,
        clients=len(cells),
        parameters=sum(cell["parameters"] for cell in cells) / len(cells),
    )
