"""Method `auto` at one client: the federation's choice, unless its own held-out rows object.

The client holds each fold of its training rows out once and compares, row by row, the federation's
choice with the base and, in a classification, with the label prior alone. If the choice trains
nothing, it also tries the adapter that the seen clients did best with: the base model was trained
on their rows and not on this client's, so an adapter may pay here and not there. With differences
d_i over N rows it leaves the choice for another one if

    Σ_i d_i > noise · √N · sd(d)

and keeps, in the same PEFT folder, one number per class (prior) or none (base) in place of ranks.
This costs one fine-tuning per fold on the other folds' rows: with two folds as much as one
fine-tuning. With `auto.try_adapter: false` a choice that trains nothing costs one forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fedp2eft.client.side import ClientSide, Outcome
from fedp2eft.errors import DivergedError
from fedp2eft.methods.auto.candidate import FREE, Candidate
from fedp2eft.methods.auto.candidates import fit, folds, has_classes, held_out
from fedp2eft.methods.auto.settings import AutoSettings
from fedp2eft.progress import current


def auto(client: ClientSide, rank: int) -> Outcome:
    """Personalize with the federation's choice, or what the client's own rows prefer to it.

    A client with few rows follows the federation; one without rows has the base alone. An adapter
    whose fine-tuning diverges is replaced by the label prior, or the base.
    """
    chosen = Candidate.of(client.prepared["chosen"].tolist())
    if not len(client.train):
        current().note("A client has no training rows: auto leaves it the base model.")
        return _fitted(client, Candidate("base"))
    # A PSG of version 0.2 keeps no adapter beside the choice.
    adapter = Candidate.of(client.prepared.get("adapter", client.prepared["chosen"]).tolist())
    decided = decide(client, chosen, adapter)
    try:
        return _fitted(client, decided)
    except DivergedError:
        current().note(f"A client's fine-tuning ({decided}) diverged: auto trains nothing there.")
        return _fitted(client, Candidate("prior" if has_classes(client) else "base"))


def _fitted(client: ClientSide, candidate: Candidate) -> Outcome:
    return replace(fit(client, candidate), choice=candidate.kind)


def decide(client: ClientSide, chosen: Candidate, adapter: Candidate) -> Candidate:
    """Return what the client personalizes with.

    Args:
        client: The client.
        chosen: The federation's choice.
        adapter: The best candidate that trains; tried where the choice trains nothing.
    """
    own: AutoSettings = client.own
    if not own.guard:
        return chosen
    if len(client.train) < own.min_rows:
        current().note(
            f"A client has {len(client.train)} training rows, too few to hold some out "
            f"(auto.min_rows is {own.min_rows}): it follows the federation's choice, {chosen}."
        )
        return chosen
    others = [Candidate("base"), *([Candidate("prior")] if has_classes(client) else [])]
    if own.try_adapter and chosen.kind in FREE and adapter.kind not in FREE:
        others.append(adapter)
    tried = [*(each for each in others if each != chosen), chosen]
    found = held_out(client, tried, folds(client, own.folds))
    return preferred(dict(zip(tried, found, strict=True)), chosen, own.noise)


def preferred(rows: Mapping[Candidate, Tensor], chosen: Candidate, noise: float) -> Candidate:
    """Return the candidate that is better than the choice beyond noise by most, else the choice.

    Args:
        rows: Log-likelihood of every row, by candidate; −inf throughout if it diverged.
        chosen: The federation's choice, one of them.
        noise: Standard errors.
    """
    if not bool(torch.isfinite(rows[chosen]).all()):
        return max((each for each in rows if each != chosen), key=lambda c: float(rows[c].sum()))
    best, most = chosen, 0.0
    for candidate, values in rows.items():
        gains = values - rows[chosen]
        gain, size = float(gains.sum()), len(gains)
        error = float(gains.std()) * size**0.5 if size > 1 else 0.0
        if gain > max(most, noise * error):
            best, most = candidate, gain
    return best
