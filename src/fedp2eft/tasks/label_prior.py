"""The label prior: what a client's label frequencies say before any of its text is read.

    p(y) = (n(y) + ½) / (N + C/2)        z(x) = f(x) + τ·(log p − log q)

n(y) are the client's training labels, N their number, C the classes, and q the label distribution
that the base model was trained on. τ = 1 is Bayes' rule for a calibrated base (Saerens et al. 2002;
logit adjustment, Menon et al., ICLR 2021).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedp2eft.errors import UserError
from fedp2eft.tasks.classification import Classification
from fedp2eft.tasks.encoded import Encoded


def label_counts(data: Encoded, classes: int) -> Tensor:
    """Return n, the rows of each class, float32."""
    return torch.bincount(torch.from_numpy(data.labels), minlength=classes).float()


def predicted_counts(bt: Any, task: Any, data: Encoded, batch_size: int) -> Tensor:
    """Return the sum over rows of what the base predicts, in place of `label_counts`."""
    task = with_classes(task, "local.label_prior: predicted")
    if not len(data):
        return torch.zeros(int(bt.model.config.num_labels))
    with bt.off():
        predicted: Tensor = task.logits(bt.model, data, batch_size).softmax(dim=1)
    return predicted.sum(dim=0)


def smoothed(counts: Tensor) -> Tensor:
    """Return the frequencies of counts, each with half a row more."""
    counts = counts + 0.5
    return counts / counts.sum()


def own_prior(counts: Tensor, q: Tensor) -> Tensor:
    """Return p of a client; q if it has no labels at all."""
    return smoothed(counts) if bool(counts.sum() > 0) else q


def offset(counts: Tensor, q: Tensor) -> Tensor:
    """Return log p − log q per class; zeros for a client without labels."""
    return own_prior(counts, q).log() - q.log()


def with_classes(task: Any, what: str) -> Classification:
    """Return the task, or raise `UserError` if it has no classes."""
    if not isinstance(task, Classification):
        raise UserError(
            f"{what} corrects class scores, and this task has no classes: leave it out."
        )
    return task


def adjusted(task: Any, data: Encoded, q: Tensor) -> Classification:
    """Return the task with the client's offset on its logits, in training and in prediction.

    Args:
        task: A classification.
        data: The client's training rows.
        q: Label distribution that the base was trained on, C.
    """
    known = with_classes(task, "local.logit_adjustment")
    return replace(known, offset=offset(label_counts(data, len(q)), q))
