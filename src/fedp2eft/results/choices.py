"""What method `auto` chose: the seen clients' choice and its cost, and each client's own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedp2eft.methods.auto.candidate import Candidate
from fedp2eft.results.at_budget import AtBudget
from fedp2eft.results.surveys import read_survey


@dataclass(frozen=True)
class Tried:
    """One candidate of the seen clients' choice.

    Args:
        candidate: In words.
        log_likelihood: Per held-out row, nats.
        worse: How far below the best candidate's, per row.
        standard_error: Of that difference, from client to client.
    """

    candidate: str
    log_likelihood: float
    worse: float
    standard_error: float


@dataclass(frozen=True)
class Choice:
    """What the seen clients of a training chose at a budget.

    Args:
        base: How the base model was trained.
        seed: The seed.
        rank: The budget.
        candidate: What was chosen, in words.
        tried: All candidates, cheapest first.
        steps: Optimizer steps of all seen clients' fine-tunings for the choice; None of a version
            before 0.3.
    """

    base: str
    seed: int
    rank: int
    candidate: str
    tried: tuple[Tried, ...]
    steps: int | None

    @property
    def text(self) -> str:
        """Return all but the table, in words."""
        cost = "" if self.steps is None else f", at {self.steps:,} fine-tuning steps in all"
        return (
            f"auto, r = {self.rank}, seed {self.seed}: of {len(self.tried)} candidates the seen "
            f"clients chose {self.candidate}{cost}."
        )


def choice_of(base: str, seed: int, rank: int, prepared: Mapping[str, Any]) -> Choice:
    """Return a choice as the surveys of `auto` give it (`fedp2eft.methods.auto.choice`)."""
    tried = tuple(
        Tried(str(Candidate.of(row[:4])), *map(float, row[4:])) for row in prepared["table"]
    )
    steps = int(prepared["steps"][0]) if "steps" in prepared else None
    return Choice(base, seed, rank, str(Candidate.of(prepared["chosen"])), tried, steps)


def choice_from(facts: Mapping[str, Any]) -> Choice:
    """Return a choice as `results.json` holds it."""
    return Choice(**{**facts, "tried": tuple(Tried(**each) for each in facts["tried"])})


def prepared_of(run: Path, at: AtBudget) -> dict[str, Any]:
    """Return what the surveys of a method gave in a run folder, as `prepared`, if that was kept."""
    kept = read_survey(run, at)
    return {"prepared": kept} if kept else {}


def choices_of(cells: Iterable[Mapping[str, Any]]) -> tuple[Choice, ...]:
    """Return the choices that the cells of a comparison hold, each once."""
    found = {
        (cell["base"], cell["seed"], cell["rank"]): cell["prepared"]
        for cell in cells
        if cell["method"] == "auto" and "prepared" in cell
    }
    return tuple(choice_of(*key, found[key]) for key in sorted(found))


def chosen_by(clients: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Return how many clients personalized with each kind of candidate, the most frequent first."""
    return dict(Counter(c["choice"] for c in clients if "choice" in c).most_common())
