"""How different the predicted structures of clients are, after every round that is kept.

Computed where the clients' features are at hand: in a simulation of one process. λ never leaves a
client of a real federation.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedp2eft.adapters.budget import keep_largest
from fedp2eft.federation.server.checkpoints import all_checkpoints
from fedp2eft.runtime.workspace import Workspace


def structure(
    round_: int,
    lam: Mapping[str, Tensor],
    languages: Mapping[str, str],
    layers: Sequence[str],
    ranks: Sequence[int],
    costs: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Compare the structures that one φ predicts for clients.

    Args:
        round_: Finished rounds.
        lam: λ̂ by client, L × r_max each; two clients or more.
        languages: Language by client.
        layers: Names of the L layers.
        ranks: Budgets.
        costs: Parameters of a rank of each layer, if the budgets are in parameters.

    Returns:
        `round` and `clients`: the finished rounds, and how many clients were looked at.
        `level`: mean λ̂ over clients and ranks.
        `spread`: how much λ̂ differs between the ranks of one client: standard deviation over mean,
        averaged over clients.
        `personal`: how much λ̂ of one rank differs between clients: standard deviation over mean,
        averaged over ranks.
        `overlap`, by budget: share of its kept ranks that a client has in common with another,
        averaged over all pairs. Two random structures share r / r_max.
        `overlap_language`: the same over pairs of one language; None where there is no such pair.
        `overlap_languages`: the same over pairs of two languages.
        `kinds`, by budget: share of the kept ranks by kind of layer (its name without digits).
    """
    stack = torch.stack([value.double() for value in lam.values()])
    masks = {
        rank: {name: keep_largest(value, rank, costs) for name, value in lam.items()}
        for rank in ranks
    }
    same = [p for p in combinations(lam, 2) if languages[p[0]] == languages[p[1]]]
    other = [p for p in combinations(lam, 2) if languages[p[0]] != languages[p[1]]]
    flat = stack.flatten(1)
    return {
        "round": round_,
        "level": float(stack.mean()),
        "spread": float((_deviation(flat, 1) / flat.mean(1)).mean()),
        "personal": float((_deviation(stack, 0) / stack.mean(0)).mean()),
        "overlap": {rank: _overlap(masks[rank], same + other) or 0.0 for rank in ranks},
        "overlap_language": {rank: _overlap(masks[rank], same) for rank in ranks},
        "overlap_languages": {rank: _overlap(masks[rank], other) for rank in ranks},
        "kinds": {rank: _kinds(masks[rank], layers) for rank in ranks},
        "clients": len(lam),
    }


def structures(
    workspace: Workspace, run: Path, clients: Sequence[str], ranks: Sequence[int]
) -> list[dict[str, Any]]:
    """Run `structure` after every round whose checkpoint the run folder keeps."""
    languages = {name: workspace.client(name).language for name in clients}
    psg, found = workspace.psg, []
    columns = psg.config.adapter.r_max  # a layer-wise λ stands for each of its layer's ranks
    for finished in all_checkpoints(run / "checkpoints", "psg"):
        psg.set_phi(finished.parameters)
        with torch.no_grad():
            lam = {name: psg(workspace.features(name)).expand(-1, columns) for name in clients}
        found.append(
            structure(finished.round, lam, languages, workspace.bt.names, ranks, workspace.costs)
        )
    return found


def _deviation(values: Tensor, dim: int) -> Tensor:
    return values.std(dim, unbiased=False)


def _overlap(masks: Mapping[str, Tensor], pairs: Sequence[tuple[str, str]]) -> float | None:
    if not pairs:
        return None
    shared = sum(int((masks[a] & masks[b]).sum()) for a, b in pairs)
    return shared / sum(int(masks[a].sum()) for a, _ in pairs)


def _kinds(masks: Mapping[str, Tensor], layers: Sequence[str]) -> dict[str, float]:
    kept: dict[str, int] = defaultdict(int)
    for mask in masks.values():
        for name, row in zip(layers, mask, strict=True):
            kept[re.sub(r"\.\d+\.", ".*.", name)] += int(row.sum())
    total = sum(kept.values())
    return {kind: count / total for kind, count in sorted(kept.items(), key=lambda kv: -kv[1])}
