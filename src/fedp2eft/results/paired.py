"""Scores of several methods on the same clients, paired."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedp2eft.results.cells import CellRecord
from fedp2eft.results.metrics import Metric, metric_of
from fedp2eft.results.statistics import Interval, paired_difference

Scored = Mapping[tuple[str, int], Mapping[int, Sequence[CellRecord]]]
"""Clients' scores by method and rank (0: none), then by seed."""


@dataclass(frozen=True)
class Paired:
    """Scores of several methods on the same clients.

    Args:
        methods: Their names.
        metric: What they are judged by.
        ranks: The budgets that all those have that have any; [0] where none has.
        languages: Of each client.
        units: What each client's metric is a mean of: test rows or tokens, (seeds, clients).
        sums: By method and rank: the metric's sum over a client's units, (seeds, clients).
    """

    methods: list[str]
    metric: Metric
    ranks: list[int]
    languages: list[str]
    units: NDArray[np.float64]
    sums: dict[tuple[str, int], NDArray[np.float64]]

    @classmethod
    def of(cls, methods: Sequence[str], cells: Scored) -> Paired | None:
        """Return what all have in common of budgets, seeds and clients; None if nothing."""
        # The budgets, and the cells of each method at them.
        budgets = {method: {rank for name, rank in cells if name == method} for method in methods}
        ranked = [found for found in budgets.values() if found != {0}]
        ranks = sorted(set.intersection(*ranked)) if ranked else [0]
        keys = [(m, r) for m in methods for r in (ranks if budgets[m] != {0} else [0])]
        seeds = sorted(set.intersection(*({*cells[key]} for key in keys)))
        if not ranks or not seeds:
            return None
        # The clients that every cell has, scored on as many rows in all.
        scores = {
            key: [{client["client"]: client for client in cells[key][seed]} for seed in seeds]
            for key in keys
        }
        every = [clients for by_seed in scores.values() for clients in by_seed]
        first = scores[keys[0]]
        if not all(every):
            return None
        metric = metric_of(next(iter(first[0].values())))
        unit = metric.unit
        names = sorted(
            name
            for name in set.intersection(*({*clients} for clients in every))
            if all(
                mine[name][unit] == theirs[name][unit]
                for by_seed in scores.values()
                for mine, theirs in zip(by_seed, first, strict=True)
            )
        )
        if not names:
            return None
        return cls(
            list(methods),
            metric,
            ranks,
            [first[0][name]["language"] for name in names],
            np.array([[float(c[name][unit]) for name in names] for c in first]),
            {
                key: np.array([[metric.total(c[name]) for name in names] for c in by_seed])
                for key, by_seed in scores.items()
            },
        )

    def sum_of(self, method: str, ranks: Sequence[int]) -> NDArray[np.float64]:
        """Return a method's sums over units, mean over budgets."""
        if (method, 0) in self.sums:
            return self.sums[method, 0]
        found: NDArray[np.float64] = np.mean([self.sums[method, rank] for rank in ranks], axis=0)
        return found

    def mean(self, method: str) -> float:
        """Return a method's metric: mean over budgets, seeds and languages."""
        sums, names = self.sum_of(method, self.ranks), np.asarray(self.languages)
        parts = [
            sums[:, names == name].sum(1) / self.units[:, names == name].sum(1)
            for name in sorted(set(self.languages))
        ]
        return float(np.mean(parts))

    def difference(self, mine: str, theirs: str, ranks: Sequence[int], seed: int) -> Interval:
        """Return one method's metric less another's, mean over budgets."""
        ours, others = self.sum_of(mine, ranks), self.sum_of(theirs, ranks)
        return paired_difference(ours, others, self.units, self.languages, seed)
