"""The label prior: what a client's label frequencies say before any of its text is read.

    p(y) = (n(y) + ½) / (N + C/2)        z(x) = f(x) + τ·(log p − log q)

n(y) are the client's training labels, N their number, C the classes, and q the label distribution
that the base model was trained on. τ = 1 is Bayes' rule for a calibrated base (Saerens et al. 2002;
logit adjustment, Menon et al., ICLR 2021).

A base is seldom calibrated, least of all on a client's text, which it has not seen. So the
calibrated prior has a temperature T beside p, fitted to the client's training rows (temperature
scaling, Guo et al., ICML 2017; calibration before label shift, Alexandari et al., ICML 2020):

    z(x) = (f(x) − log q) / T + log p
    T = argmin  Σ_i CE(z(x_i), y_i) + (log T)² / 2

log T has a standard normal prior: a client of few rows stays near T = 1. On rows that the base was
trained on, T is too small.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedp2eft.errors import UserError
from fedp2eft.tasks.classification import Classification
from fedp2eft.tasks.encoded import Encoded

TEMPERATURES = torch.linspace(-4, 4, 161, dtype=torch.float64).exp()
"""What T is chosen from: 5 % apart."""


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
    return replace(known, offset=offset(label_counts(data, len(q)), q), temperature=1.0)


def temperature(logits: Tensor, labels: Tensor, p: Tensor, q: Tensor) -> float:
    """Return T of the calibrated prior.

    Args:
        logits: What the base gives for the client's training rows, N × C.
        labels: Their classes, N.
        p: The client's label distribution, C.
        q: Label distribution that the base was trained on, C.
    """
    known = logits.double() - q.double().log()
    scaled = known / TEMPERATURES[:, None, None] + p.double().log()
    chosen = scaled.log_softmax(dim=2).gather(2, labels.expand(len(scaled), -1)[..., None])
    losses = TEMPERATURES.log() ** 2 / 2 - chosen.sum(dim=(1, 2))
    return float(TEMPERATURES[losses.argmin()])


def calibrated(task: Any, logits: Tensor, data: Encoded, q: Tensor) -> Classification:
    """Return the task with the client's calibrated prior, in training and in prediction.

    Args:
        task: A classification.
        logits: What the base gives for the client's training rows, N × C.
        data: The client's training rows.
        q: Label distribution that the base was trained on, C.
    """
    known = with_classes(task, "The calibrated label prior")
    p = own_prior(label_counts(data, len(q)), q)
    t = temperature(logits, torch.from_numpy(data.labels), p, q)
    return replace(known, offset=p.log() - q.log() / t, temperature=t)
