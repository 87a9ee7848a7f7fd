"""What stands in the tables of a comparison, as text: rows and columns, no file format."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

from fedp2eft.results.choices import Choice
from fedp2eft.results.gains import Gains, signed
from fedp2eft.results.metrics import ACCURACY, METRICS, Metric
from fedp2eft.results.statistics import Estimate
from fedp2eft.results.summary import REFERENCES, Comparison, Difference, Line
from fedp2eft.settings.experiment import Budget

MISSING = "–"
MINUS = "−"
WORSE = "worse than base"
PARAMETERS = "parameters"
COLUMNS = (
    *("mean", "worst language", "worst client", WORSE),
    *(f"to {name}" for name in REFERENCES),
    *("seeds", "steps", "seconds", PARAMETERS, "kB up", "kB down", "memory GB"),
)
NOTES = (
    "Within a language pooled over its clients' test rows, then the plain mean of the languages. "
    "Methods stand in the order of their mean, the best first. Worst language and worst client: "
    "the worst of each seed. Worse than base: share (%) of the clients that score worse than the "
    "base model itself; a / b: at each rank. To lora, to fedp2eft: difference to it at the same "
    "rank.",
    "Two kinds of interval. ± is about seeds: half the 95 % interval of a method's mean from seed "
    "to seed (Student's t). [ ] is about clients: the 95 % interval of the difference between two "
    "methods on the same clients (paired bootstrap within languages). Methods whose ± overlap may "
    "still differ: much of what changes with a seed changes for both alike.",
    "Steps (optimizer steps of a client's personalization, those of its own trials included), "
    "seconds and kB (up and down, a client and round of the method's own federation) are means per "
    "client; memory is the most that the process held.",
    f"{MISSING}: not computed, or not defined.",
)
_PARAMETERS = "Parameters: of a client's adapter, mean over clients. "
BUDGET: dict[Budget, str] = {
    "ranks": _PARAMETERS
    + "The budget r is in ranks, r per layer on average. A rank of a wide layer "
    "has more parameters, so adapters of one r may differ.",
    "parameters": _PARAMETERS
    + "The budget r is in parameters: at most as many as r ranks on every "
    "layer have.",
}


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


def gain_text(comparison: Comparison, gains: Gains) -> str:
    """Return where the gain comes from in words, with the base if there are several."""
    return (f"Base {gains.base}. " if len(comparison.bases) > 1 else "") + gains.text


def choice_texts(comparison: Comparison) -> list[str]:
    """Return what `auto` chose, in words: the seen clients together, then each pool's clients.

    A pool's text also says what it costs a client beside LoRA of the same rank.
    """
    texts = []
    several = len(comparison.bases) > 1
    for choice in comparison.choices:
        texts.append((f"Base {choice.base}. " if several else "") + choice.text)
    for line in comparison.lines:
        if line.method == "auto" and line.choices:
            counts = ", ".join(f"{kind} {count}" for kind, count in line.choices.items())
            text = f"auto, r = {line.rank}, {line.pool} clients, all seeds: {counts}"
            if line.cost.steps is not None:
                text += f"; {line.cost.steps:.1f} fine-tuning steps per client"
                lora = comparison.line(line.base, line.pool, "lora", line.rank)
                if lora and lora.cost.steps is not None:
                    text += f", lora {lora.cost.steps:.1f}"
            texts.append((f"Base {line.base}. " if several else "") + text + ".")
    return texts


def choice_table(choice: Choice) -> Table:
    """Return the candidates of the seen clients' choice × their held-out scores, nats per row."""
    head = ["candidate", "log-likelihood", "below the best", "standard error"]
    found = ((t.candidate, (t.log_likelihood, t.worse, t.standard_error)) for t in choice.tried)
    rows = [[name, *(f"{x:.4f}".replace("-", MINUS) for x in values)] for name, values in found]
    return Table(choice.text, head, rows)


def budgets(comparison: Comparison, base: str, pool: str) -> Iterator[tuple[int, str, Line | None]]:
    """Yield (rank, method, its line or None if absent) in the order in which they are shown.

    The best method of a rank comes first. A method without a budget comes again at every rank, to
    stand beside the others.
    """
    for rank in comparison.ranks:
        for method in comparison.ordered(base, [pool], [rank]):
            yield rank, method, comparison.line(base, pool, method, rank)


def compact_table(comparison: Comparison, base: str) -> Table:
    """Return methods × (pool, rank), best first: mean over languages, interval over seeds.

    Further columns hold the parameters, and per pool the share of clients worse than the base, at
    each rank.
    """
    at = [(pool, rank) for pool in comparison.pools for rank in comparison.ranks]

    def cell(method: str, pool: str, rank: int) -> str:
        line = comparison.line(base, pool, method, rank)
        if line is None:
            return MISSING
        few = "*" if len(line.mean.seeds) < len(comparison.seeds) else ""
        return score(line.mean, comparison.metric) + few

    def at_each_rank(method: str, pools: Sequence[str], shown: Callable[[list[Line]], str]) -> str:
        texts = []
        for rank in comparison.ranks:
            found = (comparison.line(base, pool, method, rank) for pool in pools)
            lines = [line for line in found if line]
            texts += [shown(lines)] if lines else []
            if any(line.rank == 0 for line in lines):
                break  # the same at every rank
        return " / ".join(texts) or MISSING

    def worse(lines: list[Line]) -> str:
        return score(lines[0].worse_than_base, ACCURACY, half=False)

    rows = [
        [method, *(cell(method, *place) for place in at)]
        + [at_each_rank(method, comparison.pools, parameters)]
        + [at_each_rank(method, [pool], worse) for pool in comparison.pools]
        for method in comparison.ordered(base)
    ]
    head = ["method", *(f"{pool} r={rank}" for pool, rank in at), PARAMETERS]
    head += [f"{pool} worse (%)" for pool in comparison.pools]
    return Table(f"{_title(comparison)} on the base {base}", head, rows)


def long_table(comparison: Comparison, base: str, pool: str) -> Table:
    """Return (rank, method) × all metrics, differences and costs of one pool."""
    rows = []
    for rank, method, line in budgets(comparison, base, pool):
        cells = column_texts(line, rank) if line else [MISSING] * len(COLUMNS)
        rows.append([str(rank), method, *cells])
    title = f"{_title(comparison)}, base {base}, pool {pool}"
    return Table(title, ["rank", "method", *COLUMNS], rows)


def language_table(comparison: Comparison, base: str, pool: str) -> Table:
    """Return (rank, method) × languages of one pool: accuracy, mean over seeds."""
    languages = comparison.languages(base, pool)
    rows = []
    for rank, method, line in budgets(comparison, base, pool):
        made = [line.languages.get(name) if line else None for name in languages]
        cells = [comparison.metric.shown(one.mean) if one else MISSING for one in made]
        rows.append([str(rank), method, *cells, *_further(line)])
    title = f"{_title(comparison)} by language, base {base}, pool {pool}"
    return Table(title, ["rank", "method", *languages, WORSE, PARAMETERS], rows)


def further_table(comparison: Comparison, base: str, pool: str) -> Table | None:
    """Return (rank, method) × a causal LM's other metrics; None if nothing has any."""
    lines = list(budgets(comparison, base, pool))
    present = [line.further_means for _, _, line in lines if line]
    names = [name for name in METRICS if any(name in means for means in present)]
    if not names:
        return None
    rows = []
    for rank, method, line in lines:
        made = [line.further_means.get(name) if line else None for name in names]
        cells = [score(one, METRICS[name]) for one, name in zip(made, names, strict=True)]
        rows.append([str(rank), method, *cells, *_further(line)])
    title = f"Perplexity per token, scores of texts in %, base {base}, pool {pool}"
    return Table(title, ["rank", "method", *names, WORSE, PARAMETERS], rows)


def _further(line: Line | None) -> tuple[str, str]:
    """Share of the clients worse than the base, and parameters."""
    if line is None:
        return MISSING, MISSING
    return score(line.worse_than_base, ACCURACY, half=False), parameters([line])


def parameters(lines: Sequence[Line]) -> str:
    """Parameters of a client's adapter, mean over the lines."""
    return f"{fmean(line.cost.parameters for line in lines):,.0f}"


def unit(metric: Metric) -> str:
    """Return what the tables and figures show the metric in."""
    return "%" if metric.higher else "nats per token"


def _title(comparison: Comparison) -> str:
    return f"{comparison.metric.name.capitalize()} ({unit(comparison.metric)})"


def column_texts(line: Line, rank: int) -> list[str]:
    """Return what a line shows at a budget under `COLUMNS`."""
    cost, metric = line.cost, METRICS[line.metric]
    return [
        score(line.mean, metric),
        score(line.worst_language, metric),
        score(line.worst_client, metric),
        score(line.worse_than_base, ACCURACY),  # a share too
        *(difference(line.difference(to, rank), metric) for to in REFERENCES),
        str(len(line.mean.seeds)),
        MISSING if cost.steps is None else f"{cost.steps:.1f}",
        f"{cost.seconds:.1f}",
        parameters([line]),
        f"{cost.bytes_up / 1e3:,.0f}",
        f"{cost.bytes_down / 1e3:,.0f}",
        f"{cost.peak_memory / 1e9:.1f}",
    ]


def score(made: Estimate | None, metric: Metric, *, half: bool = True) -> str:
    """Return a metric's value; with half its interval over seeds if `half` and it has one."""
    if made is None:
        return MISSING
    width = made.half_width if half else None
    return metric.shown(made.mean) + ("" if width is None else f" ± {metric.shown(width)}")


def difference(made: Difference | None, metric: Metric) -> str:
    """Return a difference with its sign, and with its interval where it has one."""
    if made is None:
        return MISSING
    if made.low is None or made.high is None:
        return signed(made.value, metric)
    low, high = signed(made.low, metric), signed(made.high, metric)
    return f"{signed(made.value, metric)} [{low}, {high}]"


def tables(comparison: Comparison) -> list[Table]:
    """Return, per base, the compact table, then the long one and the languages per pool."""
    return [
        table
        for base in comparison.bases
        for table in (
            compact_table(comparison, base),
            *(long_table(comparison, base, pool) for pool in comparison.pools),
            *(language_table(comparison, base, pool) for pool in comparison.pools),
            *(further_table(comparison, base, pool) for pool in comparison.pools),
        )
        if table
    ]


def notes(comparison: Comparison) -> list[str]:
    """Return what the reader of the tables must know."""
    seeds = ", ".join(map(str, comparison.seeds))
    lines = [*NOTES, BUDGET[comparison.budget], f"Seeds: {seeds}. * fewer seeds than these."]
    if comparison.other_seeds:
        others = ", ".join(map(str, comparison.other_seeds))
        lines.append(
            f"Left out: the folder also has cells of other seeds ({others}). To include them, "
            "run fedp2eft compare with all seeds in compare.seeds."
        )
    if comparison.ablations:
        lines.append(f"A diagnostic: {', '.join(comparison.ablations)}.")
    if comparison.missing:
        lines.append(f"{len(comparison.missing)} cells of the comparison are not computed yet.")
    return lines
