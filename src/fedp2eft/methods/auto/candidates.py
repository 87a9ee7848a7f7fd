"""What `auto` chooses from, and how well one candidate predicts rows that it did not see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedp2eft.client.side import ClientSide, Outcome
from fedp2eft.client.training import personalize
from fedp2eft.data.partition import rng_for
from fedp2eft.errors import DivergedError
from fedp2eft.methods import prior
from fedp2eft.methods.auto.candidate import FREE, KINDS, Candidate
from fedp2eft.methods.auto.settings import AutoSettings
from fedp2eft.methods.fedp2eft import predicted
from fedp2eft.methods.lora import uniform
from fedp2eft.settings.experiment import LocalSettings
from fedp2eft.tasks.classification import Classification
from fedp2eft.tasks.encoded import Encoded


def candidates(own: AutoSettings, rank: int, classes: bool) -> list[Candidate]:
    """Return all candidates, cheapest first; those without classes do without the label prior."""
    ranks = sorted({rank, *(r for r in own.ranks if r < rank)})
    kinds = sorted(set(own.kinds), key=KINDS.index)
    free = [Candidate(kind) for kind in kinds if kind in FREE and (classes or kind != "prior")]
    trained = [kind for kind in kinds if kind not in FREE]
    choices = product(sorted(set(own.epochs)), trained, ranks, sorted(set(own.lrs)))
    return free + [Candidate(kind, lr, epochs, r) for epochs, kind, r, lr in choices]


def has_classes(client: ClientSide) -> bool:
    """Return whether the client's task is a classification."""
    return isinstance(client.task, Classification)


def with_prior(client: ClientSide, logits: Tensor | None = None) -> ClientSide:
    """Return the client with its calibrated prior on its logits, if it has classes.

    Args:
        client: The client.
        logits: What the base gives for its training rows, if that is known.
    """
    return client.calibrated(logits) if has_classes(client) else client


def fit(
    client: ClientSide, candidate: Candidate, logits: Tensor | None = None, **how: Any
) -> Outcome:
    """Return scores and adapter of one client with a candidate; without ranks if none is trained.

    Args:
        client: The client.
        candidate: What to fit.
        logits: What the base gives for the client's training rows, if that is known.
        how: Further arguments of `ClientSide.fit`.

    Raises:
        DivergedError: The fine-tuning diverged.
    """
    side = client.plain() if candidate.kind == "base" else with_prior(client, logits)
    if candidate.kind in FREE:
        outcome = prior.unadapted(side)
    else:
        side = replace(side, settings=settings_for(side, candidate))
        outcome = side.fit(*_structure(side, candidate), **how)
    assert outcome.weights is not None
    weights = side.carrying(outcome.weights)
    if weights.offset is None and client.task.offset is not None:  # the run's is not for the base
        weights = replace(weights, offset=torch.zeros_like(client.task.offset))
    return Outcome(outcome.scores, weights)


def settings_for(client: ClientSide, candidate: Candidate) -> LocalSettings:
    """Return the client's settings at a candidate's learning rate and epochs."""
    s = client.settings
    return replace(s, personalize_lr=candidate.lr, personalize_epochs=candidate.epochs)


def _structure(client: ClientSide, candidate: Candidate) -> tuple[Tensor, Tensor]:
    """Return λ and kept ranks, both L × r_max."""
    if candidate.kind == "lora":
        return uniform(client.bt, candidate.rank)
    lam, keep = predicted(client, candidate.rank)
    return (torch.ones_like(lam) if candidate.kind == "structure" else lam), keep


# ── held-out rows ───────────────────────────────────────────────────────────────────────────────


def folds(client: ClientSide, number: int) -> list[NDArray[np.int64]]:
    """Divide the client's training rows by label into so many parts, alike in size and labels."""
    rows, labels = len(client.train), np.asarray(client.train.labels)
    shuffled = rng_for(client.seed, "auto folds").permutation(rows)
    if has_classes(client):
        shuffled = shuffled[np.argsort(labels[shuffled], kind="stable")]
    return [np.sort(shuffled[start::number]) for start in range(number)]


def held_out(
    client: ClientSide, tried: Sequence[Candidate], parts: Sequence[NDArray[np.int64]]
) -> Tensor:
    """Return the log-likelihood of every training row when its fold is held out.

    The base's logits are those of one forward pass over all rows.

    Args:
        client: The client.
        tried: C candidates.
        parts: Row indices of the folds.

    Returns:
        C × N, float64; −inf in all rows of a candidate whose fine-tuning diverged.
    """
    client = replace(client.plain(), answer=None)
    found = torch.zeros(len(tried), len(client.train), dtype=torch.float64)
    jobs = len(parts) * sum(candidate.kind not in FREE for candidate in tried)
    base = unadapted(client)
    done = 0
    for part in parts:
        rest = np.setdiff1d(np.arange(len(client.train)), part)
        fold = replace(client, train=client.train.select(rest), test=client.train.select(part))
        known = with_prior(fold, base.values[torch.from_numpy(rest)])
        for number, candidate in enumerate(tried):
            if candidate.kind in FREE:
                task = fold.task if candidate.kind == "base" else known.task
                found[number, part] = base.rows(task, part)
                continue
            found[number, part] = _trained(known.part(done, jobs), candidate)
            done += 1
    diverged = ~torch.isfinite(found).all(dim=1)
    found[diverged] = -torch.inf
    return found


@dataclass(frozen=True)
class Unadapted:
    """The base on all training rows: logits of a classification, or log-likelihoods."""

    data: Encoded
    values: Tensor

    def rows(self, task: Any, part: NDArray[np.int64]) -> Tensor:
        """Return the log-likelihood of some rows under a task, which may have a label prior."""
        chosen = self.values[torch.from_numpy(part)]
        if not isinstance(task, Classification):
            return chosen
        return _of_labels(task.adjusted(chosen), self.data.select(part))


def unadapted(client: ClientSide) -> Unadapted:
    """Return what the base gives for all training rows, in one forward pass."""
    if has_classes(client):
        return Unadapted(client.train, client.base_logits())
    size = client.settings.eval_batch_size
    with client.bt.off():
        values = row_likelihoods(client.task, client.bt.model, client.train, size)
    return Unadapted(client.train, values)


def _trained(side: ClientSide, candidate: Candidate) -> Tensor:
    """Return the log-likelihood of a fold's held-out rows after fine-tuning on the others."""
    settings = settings_for(side, candidate)
    lam, keep = _structure(side, candidate)
    order, measured = side.order(settings), []
    try:
        personalize(
            side.bt, side.task, side.train, lam, keep, order, settings,
            seed=side.seed,
            on_step=side.each_of(len(order)),
            measure=lambda model: measured.append(
                row_likelihoods(side.task, model, side.test, settings.eval_batch_size)
            ),
        )  # fmt: skip
    except DivergedError:
        return torch.full((len(side.test),), -torch.inf, dtype=torch.float64)
    return measured[0]


def row_likelihoods(task: Any, model: nn.Module, data: Encoded, batch_size: int) -> Tensor:
    """Return the log-likelihood of each row's class, or of its response's tokens; in float64."""
    if isinstance(task, Classification):
        return _of_labels(task.logits(model, data, batch_size), data)
    sums, _tokens = task.losses(model, data, batch_size)
    return -torch.as_tensor(sums, dtype=torch.float64)


def _of_labels(logits: Tensor, data: Encoded) -> Tensor:
    labels = torch.from_numpy(data.labels)[:, None]
    return logits.double().log_softmax(dim=1).gather(1, labels)[:, 0]
