"""The federation's choice: the cheapest candidate that is not clearly worse than the best.

Of several that cost the same, as learning rates do, it is the best.

Every seen client divides its training rows into folds, personalizes with every candidate on all
folds but one, and answers the sums s of the log-likelihoods of the held-out rows, and the products
of each two of them: sums over clients of both give the differences and their squares, so the choice
takes no single client's answer. Of K clients with differences d_k from the best candidate, a
candidate counts as equal to it if

    Σ_k d_k ≤ noise · √K · sd(d)

with the standard deviation over clients (the one-standard-error rule, at noise = 1), and the
cheapest of the equal ones is chosen.

A base that was trained on these rows knows their labels, and adapters look useless:
`base.held_out` keeps the clients that answer out of its training. No client's adapter or label
prior has seen them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fedp2eft.client.descent import steps_taken
from fedp2eft.client.side import ClientSide
from fedp2eft.methods.auto.candidate import FREE, Candidate
from fedp2eft.methods.auto.candidates import candidates, folds, has_classes, held_out
from fedp2eft.methods.auto.settings import AutoSettings

COLUMNS = ("kind", "lr", "epochs", "rank", "log_likelihood", "worse", "standard_error")
"""Of the table: the last three per held-out row, in nats; `worse` is the distance to the best."""


def ask(client: ClientSide, rank: int) -> dict[str, Tensor]:
    """Answer the sum of held-out log-likelihoods of each of C candidates, rows, and steps taken.

    A client with fewer than `auto.min_rows` rows answers zeros, and every client zeros for a
    candidate that diverged. The products, C × C, are of the sums less their mean at this client,
    which cancels in all differences and would drown them.
    """
    own: AutoSettings = client.own
    tried = candidates(own, rank, has_classes(client))
    before = steps_taken()
    sums, rows = torch.zeros(len(tried), dtype=torch.float64), 0
    if len(client.train) >= own.min_rows:
        rows = len(client.train)
        sums = held_out(client, tried, folds(client, own.folds)).sum(dim=1)
    diverged = ~torch.isfinite(sums)
    sums = sums.masked_fill(diverged, 0.0)
    centered = (sums - sums.sum() / max(1, int((~diverged).sum()))).masked_fill(diverged, 0.0)
    return {
        "candidates": torch.tensor([each.values() for each in tried], dtype=torch.float64),
        "sums": sums,
        "products": torch.outer(centered, centered),
        "diverged": diverged.double(),
        "rows": torch.tensor([rows], dtype=torch.float64),
        "noise": torch.tensor([own.noise], dtype=torch.float64),
        "steps": torch.tensor([steps_taken() - before], dtype=torch.float64),
    }


def choose(sums: Mapping[str, Tensor], clients: int) -> dict[str, Tensor]:
    """Return the chosen candidate ("chosen", 4 values) and the "table" (C × 7, `COLUMNS`).

    With them the best candidate that trains ("adapter", 4 values; else the chosen), and
    the "steps" of all clients' fine-tunings together, which the choice has cost.

    A candidate that diverged at any client is neither.
    """
    # All clients answer the same candidates and the same noise, so the mean is anybody's.
    known, noise = sums["candidates"] / clients, float(sums["noise"]) / clients
    total, products = sums["sums"], sums["products"]
    usable = sums["diverged"].round() == 0
    best = _best(total, usable)
    worse = total[best] - total
    # Σ (s_best − s)² from the products, and with it the variance over clients of the differences.
    squares = products[best, best] - 2 * products[best] + products.diagonal()
    variance = (squares - worse**2 / clients) / max(1, clients - 1)
    error = (variance.clamp(min=0.0) * clients).sqrt()
    equal = usable & (worse <= noise * error)
    equal[best] = True
    tried = [Candidate.of(each) for each in known.tolist()]
    cheapest = tried[int(equal.nonzero()[0])]
    cost_the_same = torch.tensor([replace(each, lr=cheapest.lr) == cheapest for each in tried])
    chosen = _best(total, equal & cost_the_same)
    rows = sums["rows"].clamp(min=1)
    table = torch.cat([known, torch.stack([total, worse, error], dim=1) / rows], dim=1)
    trained = usable & torch.tensor([each.kind not in FREE for each in tried])
    adapter = _best(total, trained) if trained.any() else chosen
    found = {"chosen": known[chosen].clone(), "adapter": known[adapter].clone()}
    return {**found, "table": table, "steps": sums["steps"]}


def _best(total: Tensor, among: Tensor) -> int:
    return int(torch.where(among, total, torch.full_like(total, -torch.inf)).argmax())
