"""What a task is judged by, from the scores that clients sent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Cell = Mapping[str, Any]
"""Scores of one client, by the names of `Scores.numbers`."""


@dataclass(frozen=True)
class Metric:
    """A mean over a client's units (rows, or response tokens).

    Several clients are pooled by their units: `value` of all their cells.

    Args:
        name: As tables head it.
        unit: Which count of a cell is its weight.
        higher: Whether more is better.
    """

    name: str
    unit: str
    higher: bool

    def total(self, cell: Cell) -> float:
        """The sum of which `value` is the mean over units: rows classified right, or nats."""
        return float(cell["correct"] if self.higher else cell["loss"] * cell[self.unit])

    def value(self, cells: Iterable[Cell]) -> float:
        """The metric of one client or of several together; at least one unit."""
        cells = list(cells)
        return sum(map(self.total, cells)) / float(sum(cell[self.unit] for cell in cells))

    def worst(self, values: Iterable[float]) -> float:
        """The worst of several values."""
        return min(values) if self.higher else max(values)

    def is_worse(self, value: float, other: float) -> bool:
        """Whether the first value is worse than the second."""
        return value < other if self.higher else value > other

    def shown(self, value: float) -> str:
        """A value as tables show it: accuracy in percent, loss in nats."""
        return f"{100 * value:.1f}" if self.higher else f"{value:.3f}"


ACCURACY = Metric("accuracy", "examples", higher=True)
RESPONSE_LOSS = Metric("response loss", "tokens", higher=False)
METRICS = {metric.name: metric for metric in (ACCURACY, RESPONSE_LOSS)}


def metric_of(cell: Cell) -> Metric:
    """What a cell's task is judged by."""
    return RESPONSE_LOSS if "tokens" in cell else ACCURACY
