"""Label-prior correction: the base's logits moved to the client's label frequencies, no training.

    logit_c + τ·(log p_c − log q_c)     p: the client's label frequencies, q: the seen clients'

A base that learned p(text | label) right and the pooled frequencies q is moved by τ = 1 to the
client's own. Frequencies are smoothed by half a row per class. Two questions choose τ on held-out
rows of the seen clients: their label counts, which q is made of, then how many held-out rows each
τ gets right. Their sums are all that is used; with `privacy.secure_sums` all that is seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fedp2eft.client.side import ClientSide, Outcome
from fedp2eft.methods.settings import TuningSettings
from fedp2eft.methods.tuned import goodness
from fedp2eft.tasks.encoded import Encoded
from fedp2eft.tasks.label_prior import label_counts, offset, smoothed, with_classes
from fedp2eft.tasks.task import Scores

NAME = "Method label-prior"


def label_prior(client: ClientSide, rank: int) -> Outcome:
    """Score the base with its logits corrected; the budget plays no part."""
    own = _counts(client, client.train)
    tau = _taus(client.own)[int(client.prepared["best"])]
    return Outcome(_scores(client, client.test, own, client.prepared["all"], [tau])[0], None)


def _taus(tuning: TuningSettings) -> list[float]:
    return sorted(set(tuning.taus))


def _scores(
    client: ClientSide, data: Encoded, own: Tensor, pooled: Tensor, taus: list[float]
) -> list[Scores]:
    """Return the scores of the rows at every τ."""
    task, bt = replace(with_classes(client.task, NAME), offset=None, temperature=1.0), client.bt
    if not len(data):
        return [task.unscored()] * len(taus)
    with bt.off():
        logits = task.logits(bt.model, data, client.settings.eval_batch_size)
    shift = offset(own, smoothed(pooled))
    return [task.scores_of(logits + tau * shift, data) for tau in taus]


def _counts(client: ClientSide, data: Encoded) -> Tensor:
    with_classes(client.task, NAME)
    return label_counts(data, int(client.bt.model.config.num_labels))


def ask_counts(client: ClientSide, _rank: int) -> dict[str, Tensor]:
    """Return rows of each class: all training rows, and those that are not held out."""
    every = _counts(client, client.train)  # first: it refuses a task without classes
    return {"all": every, "kept": _counts(client, client.trial(client.own.holdout).train)}


def pool(sums: Mapping[str, Tensor], _clients: int) -> dict[str, Tensor]:
    """Return rows of each class over all clients."""
    return dict(sums)


def ask_correct(client: ClientSide, _rank: int) -> dict[str, Tensor]:
    """Return how many held-out rows each τ gets right."""
    trial = client.trial(client.own.holdout)
    own = _counts(client, trial.train)
    scores = _scores(client, trial.test, own, client.prepared["kept"], _taus(client.own))
    good = torch.tensor([goodness(each) for each in scores])
    return {"good": good, "diverged": torch.zeros_like(good)}
