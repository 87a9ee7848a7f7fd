"""Kept ranks of languages, and how alike languages are by their λ."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedp2eft.settings.experiment import Budget

if TYPE_CHECKING:
    from fedp2eft.experiment.lambdas import Lambdas

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Grid:
    """Layers as module × layer.

    Args:
        modules: Kinds of layers, their names without the number and what all share.
        layers: Indices of the layers; "–" for those outside any.
        places: For each of the L adapted layers its (module, layer).
    """

    modules: list[str]
    layers: list[str]
    places: list[tuple[int, int]]

    def spread(self, values: Matrix) -> list[list[float | None]]:
        """Return L values as modules × layers; None where there is no such layer."""
        cells: list[list[float | None]] = [[None] * len(self.layers) for _ in self.modules]
        for (module, layer), value in zip(self.places, values.tolist(), strict=True):
            cells[module][layer] = value
        return cells


def grid_of(names: Sequence[str]) -> Grid:
    """Return the grid of adapted layers, in model order."""
    parts = [re.match(r"(?:.*?\.)?(\d+)\.(.+)", name) for name in names]
    kinds = [part[2] if part else name for part, name in zip(parts, names, strict=True)]
    indices = [part[1] if part else "–" for part in parts]
    modules = list(dict.fromkeys(kinds))
    layers = sorted({n for n in indices if n != "–"}, key=int) + ["–"] * ("–" in indices)
    places = [(modules.index(k), layers.index(n)) for k, n in zip(kinds, indices, strict=True)]
    return Grid(modules, layers, places)


def kept_by_language(
    lambdas: Lambdas, ranks: Sequence[int], budget: Budget
) -> dict[int, dict[str, Matrix]]:
    """Return kept ranks per layer, by budget and language: L values each, mean over its clients.

    Budgets above r_max are left out; all are if they are in parameters and the file, of an earlier
    version, does not tell what a rank costs.
    """
    from fedp2eft.adapters.budget import keep_largest  # torch: only where λ is there

    costs = lambdas.costs if budget == "parameters" else None
    r_max = next(iter(lambdas.lam.values())).shape[1]
    found = {}
    for rank in (rank for rank in ranks if 1 <= rank <= r_max and costs != ()):
        groups: dict[str, list[Matrix]] = defaultdict(list)
        for client, lam in lambdas.lam.items():
            kept = keep_largest(lam, rank, costs).sum(1).double().numpy()
            groups[lambdas.languages[client]].append(kept)
        found[rank] = {name: np.mean(groups[name], axis=0) for name in sorted(groups)}
    return found


def likeness(lambdas: Lambdas) -> tuple[list[str], Matrix]:
    """Return languages, clustered, and the correlation of their λ̂ without the part all share.

    log λ̂ of a language is the mean over its clients; from it the mean over the languages is taken,
    for all languages share most of their structure. Empty with fewer than three languages.
    """
    groups: dict[str, list[Matrix]] = defaultdict(list)
    for client, lam in lambdas.lam.items():
        groups[lambdas.languages[client]].append(lam.double().flatten().numpy())
    names = sorted(groups)
    if len(names) < 3:
        return [], np.zeros((0, 0))
    values = np.stack([np.mean(groups[name], axis=0) for name in names])
    values = np.log(np.maximum(values, 1e-12))
    own = values - values.mean(0)
    size = np.linalg.norm(own, axis=1, keepdims=True)
    own = np.divide(own, size, out=np.zeros_like(own), where=size > 0)
    alike = np.clip(own @ own.T, -1.0, 1.0)
    np.fill_diagonal(alike, 1.0)
    order = clustered(alike)
    return [names[i] for i in order], alike[np.ix_(order, order)]


def clustered(alike: Matrix) -> list[int]:
    """Return an order in which alike rows are neighbours (average-linkage clustering)."""
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    distance = np.maximum(0.0, 1.0 - (alike + alike.T) / 2)
    np.fill_diagonal(distance, 0.0)
    order: list[int] = leaves_list(
        linkage(squareform(distance, checks=False), "average", optimal_ordering=True)
    ).tolist()
    return order
