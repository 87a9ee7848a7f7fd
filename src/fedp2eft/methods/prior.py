"""The client's label prior alone: with the base model (`prior`, `calibrated-prior`), or with no
model (`majority`).

They train nothing. Under label skew they are the bar that an adapter must clear (METHODS:
docs/methods.md); formulas in `fedp2eft.tasks.label_prior`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.nn import functional as F

from fedp2eft.adapters.btlora import BTLora
from fedp2eft.adapters.weights import AdapterWeights
from fedp2eft.client.side import ClientSide, Outcome
from fedp2eft.tasks.label_prior import adjusted, label_counts, own_prior, with_classes
from fedp2eft.tasks.task import Scores


def prior(client: ClientSide, rank: int) -> Outcome:
    """Score the base with log p − log q added to its logits (τ = 1); the budget plays no part."""
    task = adjusted(with_classes(client.task, "Method prior"), client.train, client.q)
    return unadapted(replace(client, task=task))


def calibrated_prior(client: ClientSide, rank: int) -> Outcome:
    """Score the base with the client's calibrated prior; the budget plays no part."""
    return unadapted(client.calibrated())


def unadapted(client: ClientSide) -> Outcome:
    """Score the base with the client's label prior, if it has one on its logits."""
    with client.bt.off():
        scores = client.score(client.bt.model)
    return Outcome(scores, client.carrying(no_ranks(client.bt)))


def no_ranks(bt: BTLora) -> AdapterWeights:
    """Return an adapter that has every layer and no rank."""
    keep = torch.zeros(len(bt.names), bt.settings.r_max, dtype=torch.bool)
    return bt.weights_of(torch.ones(keep.shape), keep)


def majority(client: ClientSide, rank: int) -> Outcome:
    """Answer the client's most frequent training label, of equals the first, whatever the text.

    The loss is that of always predicting p.
    """
    task = with_classes(client.task, "Method majority")
    classes = int(client.bt.model.config.num_labels)
    uniform = torch.full((classes,), 1 / classes)
    q = uniform if client.label_prior is None else client.label_prior
    p = own_prior(label_counts(client.train, classes), q)
    data = client.test
    if not len(data):
        return Outcome(task.unscored(), None)
    labels = torch.from_numpy(data.labels)
    answer = int((p == p.max()).nonzero()[0])
    loss = F.cross_entropy(p.log().expand(len(data), -1), labels)
    return Outcome(Scores(len(data), int((labels == answer).sum()), float(loss)), None)
