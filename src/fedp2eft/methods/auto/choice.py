"""The federation's choice: the cheapest candidate that is not clearly worse than the best.

Every seen client divides its training rows into folds, personalizes with every candidate on all
folds but one, and answers the sum of the log-likelihoods of the held-out rows. The server adds
the sums up. Of K clients with differences d_k from the best candidate, a candidate counts as equal
to it if

    Σ_k d_k ≤ noise · √K · sd(d)

with the standard deviation over clients (the one-standard-error rule, at noise = 1), and the
cheapest of the equal ones is chosen.

The base was trained on these rows, as `tuned` says; no client's adapter or label prior saw them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedp2eft.client.descent import steps_taken
from fedp2eft.client.side import ClientSide
from fedp2eft.methods.auto.candidates import candidates, folds, has_classes, held_out
from fedp2eft.methods.auto.settings import AutoSettings
from fedp2eft.methods.tuned import DIVERGED

COLUMNS = ("kind", "lr", "epochs", "rank", "log_likelihood", "worse", "standard_error")
"""Of the table: the last three per held-out row, in nats; `worse` is the distance to the best."""


def ask(client: ClientSide, rank: int) -> dict[str, Tensor]:
    """Answer the sum of held-out log-likelihoods of each candidate, the rows, and the steps taken.

    A client with fewer than `auto.min_rows` rows answers zeros.
    """
    own: AutoSettings = client.own
    tried = candidates(own, rank, has_classes(client))
    before = steps_taken()
    sums, rows = torch.zeros(len(tried), dtype=torch.float64), 0
    if len(client.train) >= own.min_rows:
        rows = len(client.train)
        sums = held_out(client, tried, folds(client, own.folds)).sum(dim=1)
    return {
        "candidates": torch.tensor([each.numbers() for each in tried], dtype=torch.float64),
        "sums": sums.clamp(min=DIVERGED),
        "rows": torch.tensor([rows], dtype=torch.float64),
        "noise": torch.tensor([own.noise], dtype=torch.float64),
        "steps": torch.tensor([steps_taken() - before], dtype=torch.float64),
    }


def choose(answers: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the chosen candidate ("chosen", 4 numbers) and the "table" (C × 7, `COLUMNS`).

    With them the "steps" of all clients' fine-tunings together, which the choice has cost.

    A candidate that diverged at any client is never chosen.
    """
    known = answers[0]["candidates"]
    sums = torch.stack([answer["sums"] for answer in answers]).double()
    rows = torch.stack([answer["rows"] for answer in answers]).double().sum().clamp(min=1)
    usable = (sums > DIVERGED / 2).all(dim=0)
    total = sums.sum(dim=0)
    best = int(torch.where(usable, total, torch.full_like(total, -torch.inf)).argmax())
    differences = sums[:, best, None] - sums
    worse = differences.sum(dim=0)
    clients = len(sums)
    spread = differences.std(dim=0) if clients > 1 else torch.zeros_like(worse)
    error = spread * clients**0.5
    equal = usable & (worse <= float(answers[0]["noise"]) * error)
    equal[best] = True
    chosen = int(equal.nonzero()[0])
    table = torch.cat([known, torch.stack([total, worse, error], dim=1) / rows], dim=1)
    steps = torch.stack([answer["steps"] for answer in answers]).double().sum(dim=0)
    return {"chosen": known[chosen].clone(), "table": table, "steps": steps}
