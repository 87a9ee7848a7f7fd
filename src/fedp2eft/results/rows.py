"""Tables from cells: within a language pooled over its clients, then the plain mean of languages.

(Paper section 5, metric.)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from fedp2eft.errors import UserError
from fedp2eft.files import read_json, write_json
from fedp2eft.results.at_budget import AtBudget
from fedp2eft.results.choices import Choice, choice_from, choices_of, chosen_by, prepared_of
from fedp2eft.results.gains import Gains, adjusted, gains_from, gains_of
from fedp2eft.results.metrics import ACCURACY, further_metrics, metric_of
from fedp2eft.settings.experiment import Budget
from fedp2eft.settings.reading import settings_of_folder

PARTS = ("gains", "choices", "rows")
"""Of results.json."""


@dataclass(frozen=True)
class Row:
    """Scores of one method, budget and pool.

    Args:
        method: Its name.
        rank: Budget r; 0 for a method without one.
        pool: "seen", "unseen" or "new-language".
        languages: The metric by language, pooled over the language's test rows (response tokens):
            accuracy, 0 to 1, or response loss in nats.
        mean: Plain mean over languages.
        worst_language: The worst of a language.
        worst_client: The worst of a client.
        worse_than_base: Share of clients that score worse than the base model; None without it.
        clients: Clients scored.
        parameters: Mean number of adapter parameters of a client.
        metric: Its name; a key of `metrics.METRICS`.
        further: Other metrics of a causal LM by name, each by language and pooled in the same way:
            perplexity, and what generated texts score, 0 to 1, the mean over a language's rows.
        further_means: Their plain means over languages.
        steps: Mean number of optimizer steps of a client's personalization, trials of its own
            included; None of a version before 0.3.
        choices: How many clients a method that chooses has personalized in which way.
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
    metric: str = ACCURACY.name
    further: dict[str, dict[str, float]] = field(default_factory=dict)
    further_means: dict[str, float] = field(default_factory=dict)
    steps: float | None = None
    choices: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Results:
    """All rows of a run.

    Args:
        run: The run folder.
        rows: Sorted by pool, rank and method as they were asked for.
        gains: Where the gain comes from, per pool; empty of a run of an earlier version.
        choices: What the seen clients chose where `auto` was run.
        budget: What the ranks are a budget of.
    """

    run: Path
    rows: tuple[Row, ...]
    gains: tuple[Gains, ...] = ()
    choices: tuple[Choice, ...] = ()
    budget: Budget = "ranks"

    def row(self, method: str, rank: int, pool: str) -> Row:
        """Return one row; a `UserError` if it was not computed."""
        for row in self.rows:
            if (row.method, row.rank, row.pool) == (method, rank, pool):
                return row
        raise UserError(f"{self.run} has no result for {method}, rank {rank}, pool {pool}.")


def read_results(run: str | Path) -> Results:
    """Return the tables that `collect` wrote."""
    found = read_json(Path(run) / "results.json")
    if isinstance(found, list):  # as fedp2eft 0.1.0 wrote it
        found = {"rows": found, "gains": []}
    if not isinstance(found, dict) or "rows" not in found:
        raise UserError(f"{run} has no results yet: finish the run first.")
    rows = tuple(Row(**row) for row in found["rows"])
    gains, choices = map(gains_from, found["gains"]), map(choice_from, found.get("choices", ()))
    budget = found.get("budget", "ranks")
    return Results(Path(run), rows, tuple(gains), tuple(choices), budget)


def collect(run: str | Path) -> Results:
    """Read a run's cells, write results.json and return the tables."""
    run = Path(run)
    groups: dict[tuple[str, int, str], list[dict[str, Any]]] = defaultdict(list)
    for path in sorted(run.glob("cells/*/*.json")):
        cell, at = read_json(path), AtBudget.parse(path.parent.name)
        if at and isinstance(cell, dict) and cell["examples"]:  # without test rows: no score
            groups[(at.method, at.rank, cell["pool"])].append(cell)
    base = {
        cell["client"]: metric_of(cell).value([cell])
        for (method, _, _), cells in groups.items()
        if method == "base"
        for cell in cells
    }
    rows = tuple(
        row_of(*key, groups[key], base) for key in sorted(groups, key=lambda k: (k[2], k[1], k[0]))
    )
    settings = settings_of_folder(run)
    gains = []
    for pool in dict.fromkeys(row.pool for row in rows):
        here = {key[:2]: {settings.seed: cells} for key, cells in groups.items() if key[2] == pool}
        if found := gains_of(settings.base.kind, pool, here, adjusted=adjusted(settings)):
            gains.append(found)
    asked = {"method": "auto", "base": settings.base.kind, "seed": settings.seed}
    choices = choices_of(
        {**asked, "rank": rank, **prepared_of(run, AtBudget("auto", rank))}
        for rank in settings.evaluation.ranks
    )
    budget = settings.evaluation.budget
    results = Results(run, rows, tuple(gains), choices, budget)
    parts = {part: list(map(asdict, getattr(results, part))) for part in PARTS}
    write_json(run / "results.json", {"budget": budget, **parts})
    return results


def row_of(
    method: str, rank: int, pool: str, cells: Sequence[Mapping[str, Any]], base: Mapping[str, float]
) -> Row:
    """Return the scores of one method, budget and pool.

    Args:
        method: Its name.
        rank: Budget r; 0 for a method without one.
        pool: Whose clients.
        cells: For each client `client`, `language`, `parameters` and its scores, of one row or
            more (see `Scores.metrics`).
        base: The base model's own metric by client, for those it is known for.
    """
    metric = metric_of(cells[0])
    spoken: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for cell in cells:
        spoken[cell["language"]].append(cell)
    languages = {name: metric.value(spoken[name]) for name in sorted(spoken)}
    each = {cell["client"]: metric.value([cell]) for cell in cells}
    known = [name for name in each if name in base]
    further = {
        other.name: {name: other.value(spoken[name]) for name in sorted(spoken)}
        for other in further_metrics(cells)
    }
    steps = [cell["steps"] for cell in cells if "steps" in cell]
    worse = sum(metric.is_worse(each[name], base[name]) for name in known)
    return Row(
        method=method,
        rank=rank,
        pool=pool,
        languages=languages,
        mean=sum(languages.values()) / len(languages),
        worst_language=metric.worst(languages.values()),
        worst_client=metric.worst(each.values()),
        worse_than_base=worse / len(known) if known else None,
        clients=len(cells),
        parameters=sum(cell["parameters"] for cell in cells) / len(cells),
        metric=metric.name,
        further=further,
        further_means={name: sum(v.values()) / len(v) for name, v in further.items()},
        steps=fmean(steps) if len(steps) == len(cells) else None,
        choices=chosen_by(cells),
    )
