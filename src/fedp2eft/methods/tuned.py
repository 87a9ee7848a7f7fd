"""Methods at their best learning rate and scale, chosen on held-out rows of the seen clients.

Every seen client (of `base.held_out`, if there are any) fine-tunes on 75 % of its training rows at
every (learning rate, scale) of `tuning`'s grid and answers how many of the other 25 % each gets
right (a causal LM: their log likelihood); the best sum over the clients goes to all. The cost is
grid size × seen clients fine-tunings per rank budget, before the first client is personalized.
Nothing else leaves a client.

Without `base.held_out`, the held-out rows are rows that the base was trained on. No client's
adapter has seen them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedp2eft.client.side import ClientSide, Outcome
from fedp2eft.errors import DivergedError
from fedp2eft.methods.fedp2eft import predicted
from fedp2eft.methods.lora import uniform
from fedp2eft.methods.settings import TuningSettings
from fedp2eft.tasks.task import Scores


def grid(tuning: TuningSettings) -> list[tuple[float, float]]:
    """Return all (learning rate, scale), smallest first: of equals the first is taken."""
    return [(lr, scale) for lr in sorted(set(tuning.lrs)) for scale in sorted(set(tuning.scales))]


@dataclass(frozen=True)
class Tuned:
    """A strategy's ranks, fine-tuned at the chosen learning rate and scale on λ.

    Args:
        strategy: λ and kept ranks (both L × r_max) of a client at a budget.
    """

    strategy: Callable[[ClientSide, int], tuple[Tensor, Tensor]]

    def fit(self, client: ClientSide, rank: int) -> Outcome:
        """Fit the choice that the seen clients made."""
        return self._at(client, rank, grid(client.own)[int(client.prepared["best"])])

    def ask(self, client: ClientSide, rank: int) -> dict[str, Tensor]:
        """Return how good each choice of the grid is on a seen client's held-out rows."""
        choices, trial = grid(client.own), client.trial(client.own.holdout)
        good, diverged = torch.zeros(len(choices)), torch.zeros(len(choices))
        if len(trial.test):
            for number, choice in enumerate(choices):
                try:
                    outcome = self._at(trial.part(number, len(choices)), rank, choice)
                    good[number] = goodness(outcome.scores)
                except DivergedError:
                    diverged[number] = 1
        return {"good": good, "diverged": diverged}

    def _at(self, client: ClientSide, rank: int, choice: tuple[float, float]) -> Outcome:
        (lam, keep), (lr, scale) = self.strategy(client, rank), choice
        return client.fit(lam * scale, keep, replace(client.settings, personalize_lr=lr))


def goodness(scores: Scores) -> float:
    """Return rows classified right, or the log-likelihood of a causal LM's response tokens."""
    if scores.correct is not None:
        return float(scores.correct)
    return -scores.loss * (scores.tokens or 0)


def best(sums: Mapping[str, Tensor], _clients: int) -> dict[str, Tensor]:
    """Return the number of the choice whose goodness has the largest sum; of equals the first.

    A choice at which one client diverges serves none: fewest of them come first.
    """
    good, diverged = sums["good"], sums["diverged"]
    good = torch.where(diverged == diverged.min(), good, torch.full_like(good, -torch.inf))
    first = (good == good.max()).nonzero()[0]  # argmax may give any of equals
    return {"best": first.float()}


def uniform_ones(client: ClientSide, rank: int) -> tuple[Tensor, Tensor]:
    """Return LoRA's structure, λ = 1."""
    return uniform(client.bt, rank)


def unit_predicted(client: ClientSide, rank: int) -> tuple[Tensor, Tensor]:
    """Return FedP²EFT's structure, its λ rescaled to mean 1 over the kept ranks.

    Structure and learning rate are then separate choices, and both sides of a comparison with LoRA
    stand at the same scale.
    """
    lam, keep = predicted(client, rank)
    return lam / lam[keep].mean(), keep


of_lora, of_fedp2eft = Tuned(uniform_ones), Tuned(unit_predicted)
