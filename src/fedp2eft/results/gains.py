"""Where a gain comes from: from the base model to FedP²EFT, a paired difference per step.

The steps are differences between neighbours in this chain, of which each place may be empty:

    base → prior → temperature → adapter at uniform ranks → structure → size of λ

    prior        `prior`, or else `label-prior`; of a causal LM `unigram`
    temperature  `calibrated-prior`; not before an adapter without it
    adapter      `lora+calibrated-prior`, `lora+prior`, or else `lora`
    structure    `fedp2eft-structure`: FedP²EFT's ranks, every λ alike
    size of λ    `fedp2eft` with what the adapter before it has
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from fedp2eft.methods.method import CALIBRATED
from fedp2eft.results.metrics import Metric
from fedp2eft.results.paired import Paired, Scored
from fedp2eft.results.statistics import Interval
from fedp2eft.seeding import derive_seed
from fedp2eft.settings.experiment import Settings

PLACES = (
    ("base",),
    ("prior", "label-prior", "unigram"),
    ("calibrated-prior",),
    ("lora+calibrated-prior", "lora+prior", "lora"),
    ("fedp2eft-structure",),
    ("fedp2eft+calibrated-prior", "fedp2eft+prior", "fedp2eft"),
)


@dataclass(frozen=True)
class Step:
    """The gain of one method over another on the same clients.

    Args:
        name: What the step adds, in words.
        before: The method that it starts from.
        after: The method that it ends with.
        gain: How much better `after` is; positive is better, whatever the metric. Mean over the
            budgets, seeds and languages.
        low: Lower end of the 95 % interval of a paired bootstrap over clients.
        high: Its upper end; both None where a language has a single client.
        by_rank: The same at each budget, where there are several.
    """

    name: str
    before: str
    after: str
    gain: float
    low: float | None
    high: float | None
    by_rank: dict[int, Interval] = field(default_factory=dict)

    @property
    def kind(self) -> int:
        """1: a gain, -1: a loss, 0: no clear difference, or too few clients to say."""
        if self.low is None or self.high is None:
            return 0
        return 1 if self.low > 0 else -1 if self.high < 0 else 0


@dataclass(frozen=True)
class Gains:
    """What the clients of a pool gain, in all and in steps.

    Args:
        base: How the base model was trained.
        pool: Whose clients.
        metric: Name of the metric; a key of `fedp2eft.results.metrics.METRICS`.
        ranks: The budgets; a method with a budget counts with its mean over them.
        clients: Clients per seed: those that all methods of the steps scored.
        start: The metric of the first method, mean over languages.
        end: That of the last.
        total: From the first to the last.
        steps: The steps between, which sum up to the total.
        text: All of it in two sentences.
    """

    base: str
    pool: str
    metric: str
    ranks: list[int]
    clients: int
    start: float
    end: float
    total: Step
    steps: tuple[Step, ...]
    text: str


def gains_of(base: str, pool: str, cells: Scored, *, adjusted: bool = False) -> Gains | None:
    """Return the gains of one pool; None where fewer than two methods of the chain have scores.

    Args:
        base: How the base model was trained.
        pool: Whose clients.
        cells: Their scores.
        adjusted: Whether `lora` and `fedp2eft` themselves have the label prior in their logits.
    """
    chain = _chain({method for method, _ in cells})
    while len(chain) > 1:
        if paired := Paired.of(chain, cells):
            every = {seed for by_seed in cells.values() for seed in by_seed}
            return _gains(base, pool, paired, adjusted, every)
        chain.pop()  # it has no cell yet at a budget, seed or client of the others
    return None


def gains_from(facts: Mapping[str, Any]) -> Gains:
    """Return gains as `results.json` holds them."""

    def step(made: Mapping[str, Any]) -> Step:
        by_rank = {int(rank): Interval(**found) for rank, found in made["by_rank"].items()}
        return Step(**{**made, "by_rank": by_rank})

    steps = tuple(map(step, facts["steps"]))
    return Gains(**{**facts, "total": step(facts["total"]), "steps": steps})


def adjusted(settings: Settings) -> bool:
    """Return whether these settings' methods have the client's label prior in their logits."""
    return settings.local.logit_adjustment != "none"


def _chain(there: set[str]) -> list[str]:
    """Return the methods of the chain that are there, one per place."""
    base, prior, temperature, lora, structure, size = (
        [name for name in place if name in there] for place in PLACES
    )
    kind = lora[0].removeprefix("lora") if lora else ""
    if lora and kind != CALIBRATED:
        temperature = []
    if kind:
        structure = []
    # beside the LoRA whose logits are alike
    size = [name for name in size if name == "fedp2eft" + kind]
    return [place[0] for place in (base, prior, temperature, lora, structure, size) if place]


def _gains(base: str, pool: str, paired: Paired, adjusted: bool, every: set[int]) -> Gains:
    seed = derive_seed("bootstrap", base, pool)
    chain, ranks, metric = paired.methods, paired.ranks, paired.metric

    def gain(before: str, after: str, ranks: Sequence[int]) -> Interval:
        mine, theirs = (after, before) if metric.higher else (before, after)
        return paired.difference(mine, theirs, ranks, seed)

    def step(name: str, before: str, after: str) -> Step:
        made = gain(before, after, ranks)
        ranked = len(ranks) > 1 and any((m, ranks[0]) in paired.sums for m in (before, after))
        by_rank = {r: gain(before, after, [r]) for r in ranks} if ranked else {}
        return Step(name, before, after, made.value, made.low, made.high, by_rank)

    steps = tuple(step(_name(a, b, adjusted), a, b) for a, b in pairwise(chain))
    total = step("all steps", chain[0], chain[-1])
    start, end = paired.mean(chain[0]), paired.mean(chain[-1])
    clients = paired.clients
    whose = f"{pool.capitalize()} clients ({clients}"
    if len(paired.seeds) < len(every):
        whose += f"; {'seed' if len(paired.seeds) == 1 else 'seeds'} {_listed(paired.seeds)} alone"
    text = _text(f"{whose})", metric, ranks, (start, end), total, steps)
    return Gains(base, pool, metric.name, ranks, clients, start, end, total, steps, text)


def _name(before: str, after: str, adjusted: bool) -> str:
    """Return what a step adds."""
    if after in PLACES[1]:
        return f"the client's {'unigram' if after == 'unigram' else 'label prior'}"
    if after in PLACES[2]:
        return "a temperature of the base's logits"
    if after in PLACES[3]:
        beyond = before in (*PLACES[1], *PLACES[2])
        on_top = adjusted or after != "lora"
        return "LoRA at uniform ranks" + (
            "" if not beyond else " on top of it" if on_top else " in place of it"
        )
    if after == "fedp2eft-structure":
        return "FedP²EFT's choice of ranks"
    return (
        "the size of its λ"
        if before == "fedp2eft-structure"
        else "FedP²EFT's choice of ranks and λ"
    )


def _text(
    whose: str,
    metric: Metric,
    ranks: Sequence[int],
    ends: tuple[float, float],
    total: Step,
    steps: Sequence[Step],
) -> str:
    """Return two sentences: what was gained, and from what."""
    unit = " %" if metric.higher else " nats per token"
    start, end = (metric.shown(value) + unit for value in ends)
    budget = f", r = {ranks[0]}" if ranks != [0] else ""
    if len(ranks) > 1:
        budget = f", mean of r = {_listed(ranks)}"
    what = judged(total, metric, ("a gain of", "a loss of", "no clear difference"))
    first = (
        f"{whose}: {metric.name} goes from {start} "
        f"({_method(total.before)}) to {end} ({_method(total.after)}{budget}), {what}."
    )
    if len(steps) == 1:
        return first
    parts = [f"{step.name} {judged(step, metric)}" for step in steps]
    return f"{first} Step by step: {'; '.join(parts)}."


def _listed(numbers: Sequence[int]) -> str:
    *first, last = map(str, numbers)
    return f"{', '.join(first)} and {last}" if first else last


def judged(
    step: Step,
    metric: Metric,
    words: Sequence[str] = ("gains", "loses", "makes no clear difference"),
) -> str:
    """Return a gain in words: one of three kinds, the number and its interval."""
    shown = signed(step.gain, metric)
    if step.low is None or step.high is None:
        return f"{words[step.gain < 0]} {shown} (too few clients for an interval)"
    span = f"[{signed(step.low, metric)}, {signed(step.high, metric)}]"
    if step.kind == 0:
        return f"{words[2]} ({shown} {span}, which includes 0)"
    return f"{words[step.kind < 0]} {shown} {span}"


def signed(value: float, metric: Metric) -> str:
    """Return a difference with its sign: points of a share, nats of a loss."""
    text = metric.shown(abs(value))
    return text if not float(text) else ("+" if value > 0 else "−") + text


def _method(name: str) -> str:
    return "base model" if name == "base" else name
