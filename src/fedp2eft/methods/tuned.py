"""Methods at their best learning rate and scale, chosen on held-out rows of the seen clients.

Every seen client fine-tunes on 75 % of its training rows at every (learning rate, scale) of
`tuning`'s grid and answers how many of the other 25 % each gets right (a causal LM: their log
likelihood); the best sum over the clients goes to all. The cost is grid size × seen clients
fine-tunings per rank budget, before the first client is personalized. Only these numbers leave a
client.

The held-out rows are rows that the base, and the PSG, may have been trained on: no client's
adapter has seen them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from fedp2eft.client.training import unit_mean
from fedp2eft.errors import DivergedError
from fedp2eft.methods.fedp2eft import predicted
from fedp2eft.methods.lora import uniform
from fedp2eft.methods.method import ClientSide, Method, Outcome, Strategy, Survey
from fedp2eft.settings.experiment import TuningSettings
from fedp2eft.tasks.task import Scores

DIVERGED = -(2.0**100)  # a choice at which one client diverges serves none; finite: it travels


def grid(tuning: TuningSettings) -> list[tuple[float, float]]:
    """All (learning rate, scale), smallest first: of equals the first is taken."""
    return [(lr, scale) for lr in sorted(set(tuning.lrs)) for scale in sorted(set(tuning.scales))]


def method(strategy: Strategy, shared: Literal["psg"] | None = None) -> Method:
    """The method that fine-tunes a strategy's ranks at the chosen learning rate and scale on λ."""

    def at(client: ClientSide, rank: int, choice: tuple[float, float]) -> Outcome:
        (lam, keep), (lr, scale) = strategy(client, rank), choice
        return client.fit(lam * scale, keep, replace(client.settings, personalize_lr=lr))

    def fit(client: ClientSide, rank: int) -> Outcome:
        return at(client, rank, grid(client.tuning)[int(client.prepared["best"])])

    def ask(client: ClientSide, rank: int) -> dict[str, Tensor]:
        choices, trial = grid(client.tuning), client.trial(client.tuning.holdout)
        good = torch.zeros(len(choices))
        if len(trial.test):
            for number, choice in enumerate(choices):
                try:
                    outcome = at(trial.part(number, len(choices)), rank, choice)
                    good[number] = goodness(outcome.scores)
                except DivergedError:
                    good[number] = DIVERGED
        return {"good": good}

    return Method(fit, shared=shared, surveys=(Survey(ask, best),))


def goodness(scores: Scores) -> float:
    """Rows classified right, or the log likelihood of a causal LM's response tokens."""
    if scores.correct is not None:
        return float(scores.correct)
    return -scores.loss * (scores.tokens or 0)


def best(answers: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The number of the choice whose goodness has the largest sum; of equals the first."""
    total = torch.stack([answer["good"] for answer in answers]).double().sum(dim=0)
    first = (total == total.max()).nonzero()[0]  # argmax may give any of equals
    return {"best": first.float()}


def uniform_ones(client: ClientSide, rank: int) -> tuple[Tensor, Tensor]:
    """LoRA's structure, λ = 1."""
    return uniform(client.bt, rank)


def unit_predicted(client: ClientSide, rank: int) -> tuple[Tensor, Tensor]:
    """FedP²EFT's structure, its λ rescaled to mean 1 over the kept ranks.

    Structure and learning rate are then separate choices, and both sides of a comparison with LoRA
    stand at the same scale.
    """
    lam, keep = predicted(client, rank)
    return unit_mean(lam, keep), keep
