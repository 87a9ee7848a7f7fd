"""What the cells of a comparison say: scores over seeds, differences to references, cost."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

from fedp2eft.methods import METHODS
from fedp2eft.results.at_budget import AtBudget
from fedp2eft.results.cells import CellRecord, name_of, scored, values
from fedp2eft.results.choices import Choice, choices_of, chosen_by
from fedp2eft.results.gains import Gains, adjusted, gains_of
from fedp2eft.results.metrics import ACCURACY, METRICS, Metric
from fedp2eft.results.paired import Paired
from fedp2eft.results.plan import Cell, plan
from fedp2eft.results.rows import Row, row_of
from fedp2eft.results.statistics import Estimate, estimate
from fedp2eft.seeding import derive_seed
from fedp2eft.settings.experiment import Budget, Settings

Key = tuple[str, str, str, int]
"""Base, pool, method, rank."""

REFERENCES = ("lora", "fedp2eft")


@dataclass(frozen=True)
class Difference:
    """The metric of a method minus a reference's, on the same base, pool, seeds and clients.

    Args:
        to: The reference.
        rank: The reference's budget; the method's own too, where it has one.
        value: Difference of the means over languages, mean over seeds.
        low: Lower end of the bootstrap interval over clients (see `paired_difference`).
        high: Its upper end; both None where there can be none.
    """

    to: str
    rank: int
    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Cost:
    """What a method costs, mean over seeds.

    Args:
        seconds: Wall seconds a client takes to personalize and be scored.
        steps: Optimizer steps of a client's personalization, trials of its own included; None
            where cells of a version before 0.3 lack them.
        parameters: Adapter parameters of a client.
        bytes_up: Bytes a client sent per round while the method's shared parameters were trained.
        bytes_down: Bytes it got.
        peak_memory: Most bytes resident in the process, the largest of the seeds.
    """

    seconds: float
    steps: float | None
    parameters: float
    bytes_up: float
    bytes_down: float
    peak_memory: int


@dataclass(frozen=True)
class Line:
    """One method at one budget, on one base and pool.

    Args:
        base: How the base model was trained.
        pool: "seen", "unseen" or "new-language".
        method: Its name.
        rank: Budget r; 0 for a method without one.
        clients: Clients scored per seed, on average.
        languages: The metric by language, pooled over its clients' test rows.
        mean: Plain mean over languages.
        worst_language: The worst of a language.
        worst_client: The worst of a client.
        worse_than_base: Share of clients that score worse than the base model; None without it.
        differences: To the references, at every budget that both have.
        cost: What it costs.
        metric: Name of the metric; a key of `fedp2eft.results.metrics.METRICS`.
        further: A causal LM's other metrics by name, each by language: perplexity, and the scores
            of generated texts.
        further_means: Their plain means over languages.
        choices: How many clients, over all seeds, a method that chooses has personalized in which
            way.
    """

    base: str
    pool: str
    method: str
    rank: int
    clients: float
    languages: dict[str, Estimate]
    mean: Estimate
    worst_language: Estimate
    worst_client: Estimate
    worse_than_base: Estimate | None
    differences: tuple[Difference, ...]
    cost: Cost
    metric: str
    further: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    further_means: dict[str, Estimate] = field(default_factory=dict)
    choices: dict[str, int] = field(default_factory=dict)

    def difference(self, to: str, rank: int) -> Difference | None:
        """Return the difference to a reference at its budget `rank`."""
        return next((d for d in self.differences if (d.to, d.rank) == (to, rank)), None)


@dataclass(frozen=True)
class Comparison:
    """All lines of a comparison, and the axes along which they are shown.

    Args:
        bases: In the order of the settings.
        pools: In the order of the settings.
        methods: In the order of the settings.
        ranks: In the order of the settings.
        seeds: In the order of the settings.
        lines: One for every method and budget that has a cell, in the order of the axes.
        gains: Where the gain comes from, for every base and pool that has two methods of the chain
            (see `fedp2eft.results.gains`).
        missing: Names of the cells that are not there.
        machines: Machines that computed the cells.
        versions: Versions of the packages that computed them.
        ablations: What was done to the clients' rows for a diagnostic (see `DataSettings`).
        choices: What the seen clients chose where `auto` was run.
        budget: What the ranks are a budget of.
        other_seeds: Seeds that have cells in the folder and that the settings do not ask for.
    """

    bases: list[str]
    pools: list[str]
    methods: list[str]
    ranks: list[int]
    seeds: list[int]
    lines: tuple[Line, ...]
    gains: tuple[Gains, ...]
    missing: list[str]
    machines: list[str]
    versions: list[dict[str, str]]
    ablations: list[str] = field(default_factory=list)
    choices: tuple[Choice, ...] = ()
    budget: Budget = "ranks"
    other_seeds: list[int] = field(default_factory=list)

    @property
    def metric(self) -> Metric:
        """What its task is judged by."""
        return METRICS[self.lines[0].metric] if self.lines else ACCURACY

    def line(self, base: str, pool: str, method: str, rank: int) -> Line | None:
        """Return a method's line at a budget (one line if it has none); None if not computed."""
        for line in self.lines:
            same = (line.base, line.pool, line.method) == (base, pool, method)
            if same and line.rank in (rank, 0):
                return line
        return None

    def ordered(self, base: str, pools: Sequence[str] = (), ranks: Sequence[int] = ()) -> list[str]:
        """Return the methods, the best first: by the mean of what they have at pools and ranks.

        Methods without a number come last.

        Args:
            base: How the base model was trained.
            pools: Which pools count. Default: all.
            ranks: Which budgets count. Default: all.
        """

        def place(method: str) -> tuple[bool, float]:
            found = (
                self.line(base, pool, method, rank)
                for pool in pools or self.pools
                for rank in ranks or self.ranks
            )
            means = [line.mean.mean for line in found if line]
            sign = -1 if self.metric.higher else 1
            return not means, sign * fmean(means) if means else 0.0

        return sorted(self.methods, key=place)

    def languages(self, base: str, pool: str) -> list[str]:
        """Return the languages of a pool, sorted."""
        lines = [line for line in self.lines if (line.base, line.pool) == (base, pool)]
        return sorted({language for line in lines for language in line.languages})


def summarize(settings: Settings, cells: Iterable[CellRecord]) -> Comparison:
    """Return the lines of a comparison.

    Args:
        settings: The comparison: its bases, pools, methods, ranks and seeds.
        cells: In any order; those that the settings do not ask for are left out. A method that is
            not installed (any more) keeps the cells that it has.
    """
    cells, evaluation = list(cells), settings.evaluation
    # The cells that the settings ask for.
    installed = [name for name in evaluation.methods if name in METHODS]
    planned = {
        cell.name: cell
        for cell in plan(replace(settings, evaluation=replace(evaluation, methods=installed)))
    }
    trainings = {
        (cell.training.base, cell.training.seed): cell.training for cell in planned.values()
    }
    # A method that is not installed here has no plan: take its cells as they are.
    for record in cells:
        if record["method"] in set(evaluation.methods) - {*installed}:
            training = trainings.get((record["base"], record["seed"]))
            if training and record["pool"] in evaluation.pools:
                budget = evaluation.budget if record["rank"] else "ranks"
                at = AtBudget(record["method"], record["rank"], budget)
                cell = Cell(training, record["pool"], at)
                planned[cell.name] = cell
    # Group by line of the table, then by seed.
    found = {name_of(record): record for record in cells if name_of(record) in planned}
    groups: dict[Key, dict[int, CellRecord]] = defaultdict(dict)
    for name, cell in planned.items():  # the order of the settings
        if name in found and scored(found[name]):
            key = (cell.training.base, cell.pool, cell.at.method, cell.at.rank)
            groups[key][cell.training.seed] = found[name]
    # Lines stand in the order of the settings.
    axes: tuple[list[str], ...] = (
        list(settings.compare.bases or [settings.base.kind]),
        [str(pool) for pool in evaluation.pools],
        evaluation.methods,
    )

    def place(key: Key) -> list[int]:
        return [*(axis.index(name) for axis, name in zip(axes, key[:3], strict=True)), key[3]]

    order = sorted(groups, key=place)
    versions = {tuple(sorted(record["versions"].items())) for record in found.values()}
    return Comparison(
        bases=axes[0],
        pools=axes[1],
        methods=axes[2],
        ranks=list(evaluation.ranks) or [0],
        seeds=list(settings.compare.seeds),
        lines=tuple(_line(key, groups) for key in order),
        gains=tuple(_gains(settings, {key: groups[key] for key in order})),
        missing=[name for name in planned if name not in found],
        machines=sorted({record["machine"] for record in found.values()}),
        versions=[dict(items) for items in sorted(versions)],
        ablations=settings.data.ablations,
        choices=choices_of(found.values()),
        budget=evaluation.budget,
        other_seeds=sorted({record["seed"] for record in cells} - {*settings.compare.seeds}),
    )


def _line(key: Key, groups: Mapping[Key, Mapping[int, CellRecord]]) -> Line:
    base, pool, method, rank = key
    mine = groups[key]
    own = groups.get((base, pool, "base", 0), {})
    # One row per seed; the line is their mean.
    rows: dict[int, Row] = {
        seed: row_of(method, rank, pool, scored(record), values(own.get(seed)))
        for seed, record in mine.items()
    }

    def over_seeds(name: str) -> Estimate:
        made = estimate({seed: getattr(row, name) for seed, row in rows.items()})
        assert made is not None
        return made

    # Texts count where every seed has them: a mean over other seeds than the loss's misleads.
    first, *others = (row.further for row in rows.values())
    further = [name for name in first if all(name in other for other in others)]
    steps = [row.steps for row in rows.values() if row.steps is not None]
    worse = {s: r.worse_than_base for s, r in rows.items() if r.worse_than_base is not None}
    return Line(
        base=base,
        pool=pool,
        method=method,
        rank=rank,
        clients=fmean(row.clients for row in rows.values()),
        languages=dict(sorted(_by_name({s: row.languages for s, row in rows.items()}).items())),
        mean=over_seeds("mean"),
        worst_language=over_seeds("worst_language"),
        worst_client=over_seeds("worst_client"),
        worse_than_base=estimate(worse),
        differences=tuple(
            difference
            for other, theirs in groups.items()
            if other[:2] == key[:2] and other[2] in REFERENCES and other[2] != method
            if rank in (other[3], 0)
            if (difference := _difference(key, mine, other, theirs))
        ),
        cost=Cost(
            steps=fmean(steps) if len(steps) == len(rows) else None,
            seconds=fmean(
                fmean(c["seconds"] for c in record["clients"]) for record in mine.values()
            ),
            parameters=fmean(row.parameters for row in rows.values()),
            bytes_up=fmean(record["bytes_up"] for record in mine.values()),
            bytes_down=fmean(record["bytes_down"] for record in mine.values()),
            peak_memory=max(record["peak_memory"] for record in mine.values()),
        ),
        metric=next(iter(rows.values())).metric,
        further={n: _by_name({s: row.further[n] for s, row in rows.items()}) for n in further},
        further_means=_by_name(
            {s: {n: row.further_means[n] for n in further} for s, row in rows.items()}
        ),
        choices=chosen_by([client for record in mine.values() for client in scored(record)]),
    )


def _by_name(values: Mapping[int, Mapping[str, float]]) -> dict[str, Estimate]:
    """Return values by seed and name as estimates by name."""
    by_name: dict[str, dict[int, float]] = defaultdict(dict)
    for seed, named in values.items():
        for name, value in named.items():
            by_name[name][seed] = value
    made = {name: estimate(seeds) for name, seeds in by_name.items()}
    return {name: one for name, one in made.items() if one}


def _difference(
    key: Key, mine: Mapping[int, CellRecord], other: Key, theirs: Mapping[int, CellRecord]
) -> Difference | None:
    """Compare on the seeds of both, and the clients that both scored on as many rows in all."""
    paired = Paired.of([key[2], other[2]], {key[2:]: _by_seed(mine), other[2:]: _by_seed(theirs)})
    if paired is None:
        return None
    made = paired.difference(key[2], other[2], paired.ranks, derive_seed("bootstrap", *key[:2]))
    return Difference(other[2], other[3], made.value, made.low, made.high)


def _by_seed(cells: Mapping[int, CellRecord]) -> dict[int, Sequence[CellRecord]]:
    return {seed: scored(record) for seed, record in cells.items()}


def _gains(settings: Settings, groups: Mapping[Key, Mapping[int, CellRecord]]) -> Iterator[Gains]:
    """Yield where the gain comes from, on every base and pool."""
    places = dict.fromkeys(key[:2] for key in groups)
    for base, pool in places:
        cells = {key[2:]: _by_seed(groups[key]) for key in groups if key[:2] == (base, pool)}
        if found := gains_of(base, pool, cells, adjusted=adjusted(settings)):
            yield found
