"""What a task is judged by, from the scores that clients sent."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedp2eft.tasks.text_scores import METEOR, PLAIN_METEOR

ClientScores = Mapping[str, Any]
"""Scores of one client, by the names of `Scores.metrics`."""


@dataclass(frozen=True)
class Metric:
    """A mean over a client's units (rows, or response tokens).

    Several clients are pooled by their units: `value` of all their cells.

    Args:
        name: As tables head it.
        unit: Which count of a cell is its weight.
        higher: Whether more is better.
        summed: Which number of a cell is the sum over its units; none where its loss is the mean.
        exponential: Whether `value` is the exponential of the mean.
    """

    name: str
    unit: str
    higher: bool
    summed: str = ""
    exponential: bool = False

    def total(self, cell: ClientScores) -> float:
        """Return the sum over a client's units: rows classified right, nats, or scores of texts."""
        return float(cell[self.summed] if self.summed else cell["loss"] * cell[self.unit])

    def value(self, cells: Iterable[ClientScores]) -> float:
        """Return the metric of one client or of several together; at least one unit."""
        cells = list(cells)
        mean = sum(map(self.total, cells)) / float(sum(cell[self.unit] for cell in cells))
        return math.exp(min(mean, 700.0)) if self.exponential else mean

    def worst(self, values: Iterable[float]) -> float:
        """Return the worst of several values."""
        return min(values) if self.higher else max(values)

    def is_worse(self, value: float, other: float) -> bool:
        """Return whether the first value is worse than the second."""
        return value < other if self.higher else value > other

    def shown(self, value: float) -> str:
        """Return a value as tables show it: shares and text scores in percent, loss in nats."""
        return f"{100 * value:.1f}" if self.higher else f"{value:.3f}"


ACCURACY = Metric("accuracy", "examples", higher=True, summed="correct")
RESPONSE_LOSS = Metric("response loss", "tokens", higher=False)
PERPLEXITY = Metric("perplexity", "tokens", higher=False, exponential=True)
TEXTS = tuple(
    Metric(name, "examples", higher=True, summed=key)
    for name, key in (
        ("ROUGE-1", "rouge1"),
        ("ROUGE-2", "rouge2"),
        ("ROUGE-L", "rougeL"),
        ("METEOR", METEOR),
        ("METEOR without synonyms", PLAIN_METEOR),
        ("chrF", "chrf"),
    )
)
METRICS = {metric.name: metric for metric in (ACCURACY, RESPONSE_LOSS, PERPLEXITY, *TEXTS)}


def metric_of(cell: ClientScores) -> Metric:
    """Return the metric that a cell's task is judged by."""
    return RESPONSE_LOSS if "tokens" in cell else ACCURACY


def further_metrics(cells: Sequence[ClientScores]) -> tuple[Metric, ...]:
    """Return the metrics beside `metric_of` that every one of the cells has."""
    if metric_of(cells[0]) is ACCURACY:
        return ()
    return (PERPLEXITY, *(m for m in TEXTS if all(m.summed in cell for cell in cells)))
