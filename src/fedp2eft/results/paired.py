"""Scores of several methods on the same clients, paired."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedp2eft.results.cells import CellRecord
from fedp2eft.results.metrics import Metric, metric_of
from fedp2eft.results.statistics import Interval, language_mean, paired_difference

Scored = Mapping[tuple[str, int], Mapping[int, Sequence[CellRecord]]]
"""Clients' scores by method and rank (0: none), then by seed."""


@dataclass(frozen=True)
class Paired:
    """Scores of several methods on the same clients.

    Args:
        methods: Their names.
        metric: What they are judged by.
        ranks: The budgets that all those have that have any, with as many seeds as at any of them;
            [0] where none has.
        seeds: The seeds that all have at these budgets.
        languages: Of each client.
        units: What each client's metric is a mean of: test rows or tokens, (seeds, clients); 0
            where a seed lacks the client, as when each seed draws its own languages.
        sums: By method and rank: the metric's sum over a client's units, (seeds, clients).
    """

    methods: list[str]
    metric: Metric
    ranks: list[int]
    seeds: list[int]
    languages: list[str]
    units: NDArray[np.float64]
    sums: dict[tuple[str, int], NDArray[np.float64]]

    @classmethod
    def of(cls, methods: Sequence[str], cells: Scored) -> Paired | None:
        """Return what all have in common of budgets, seeds and clients; None if nothing."""
        # The budgets, and the cells of each method at them.
        budgets = {method: {rank for name, rank in cells if name == method} for method in methods}
        ranked = {method: found for method, found in budgets.items() if found != {0}}
        ranks = sorted(set.intersection(*ranked.values())) if ranked else [0]
        common = {
            rank: set.intersection(*({*cells[m, rank if m in ranked else 0]} for m in methods))
            for rank in ranks
        }
        # A budget that is not finished yet must not take seeds away from the others.
        most: set[int] = max([*common.values(), set()], key=len)
        seeds = sorted(most)
        ranks = [rank for rank in ranks if common[rank].issuperset(seeds)]
        if not seeds:
            return None
        keys = [(m, r) for m in methods for r in (ranks if m in ranked else [0])]
        scores = {
            key: [{client["client"]: client for client in cells[key][seed]} for seed in seeds]
            for key in keys
        }
        first = scores[keys[0]]
        if not all(clients for by_seed in scores.values() for clients in by_seed):
            return None
        metric = metric_of(next(iter(first[0].values())))
        # Of each seed the clients that all its cells have, scored on as many units in all.
        kept = [
            {
                name: float(client[metric.unit])
                for name, client in first[n].items()
                if all(
                    name in by_seed[n] and by_seed[n][name][metric.unit] == client[metric.unit]
                    for by_seed in scores.values()
                )
            }
            for n in range(len(seeds))
        ]
        rows = [n for n, mine in enumerate(kept) if mine]
        if not rows:
            return None
        language = {name: first[n][name]["language"] for n in rows for name in kept[n]}
        names = sorted(language)

        def totals(clients: Mapping[str, Any], mine: Mapping[str, float]) -> list[float]:
            return [metric.total(clients[name]) if name in mine else 0.0 for name in names]

        return cls(
            list(methods),
            metric,
            ranks,
            [seeds[n] for n in rows],
            [language[name] for name in names],
            np.array([[kept[n].get(name, 0.0) for name in names] for n in rows]),
            {
                key: np.array([totals(by_seed[n], kept[n]) for n in rows])
                for key, by_seed in scores.items()
            },
        )

    @property
    def clients(self) -> int:
        """Number of clients per seed, in the mean."""
        return round(float((self.units > 0).sum(axis=1).mean()))

    def sum_of(self, method: str, ranks: Sequence[int]) -> NDArray[np.float64]:
        """Return a method's sums over units, mean over budgets."""
        if (method, 0) in self.sums:
            return self.sums[method, 0]
        found: NDArray[np.float64] = np.mean([self.sums[method, rank] for rank in ranks], axis=0)
        return found

    def mean(self, method: str) -> float:
        """Return a method's metric: mean over budgets, seeds and the seed's languages."""
        return language_mean(self.sum_of(method, self.ranks), self.units, self.languages)

    def difference(self, mine: str, theirs: str, ranks: Sequence[int], seed: int) -> Interval:
        """Return one method's metric less another's, mean over budgets."""
        ours, others = self.sum_of(mine, ranks), self.sum_of(theirs, ranks)
        return paired_difference(ours, others, self.units, self.languages, seed)
