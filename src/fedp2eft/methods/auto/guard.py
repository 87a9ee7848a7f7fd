"""Method `auto` at one client: the federation's choice, unless its own held-out rows object.

The client compares, row by row on rows held out, the federation's choice with the base and, in a
classification, with the label prior alone. If the choice trains nothing, it also tries the adapter
that the seen clients did best with: an adapter may pay here that did not pay there. With
differences d_i over N rows it leaves the choice for another one if

    Σ_i d_i > noise · √N · sd(d)

and keeps, in the same PEFT folder, one number per class (prior) or none (base) in place of ranks.

`auto.hold_out` says which rows are held out. "half": the first half of the fine-tuning's steps uses
half of the rows, and the other half is held out; then the client either leaves the adapter or goes
on with the other rows, so that it computes no more than one fine-tuning. "folds": each fold is held
out once, and an adapter that passes is fine-tuned anew on all rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from fedp2eft.client.descent import local_order
from fedp2eft.client.side import ClientSide, Outcome
from fedp2eft.errors import DivergedError
from fedp2eft.methods.auto.candidate import FREE, Candidate
from fedp2eft.methods.auto.candidates import (
    fit,
    folds,
    has_classes,
    held_out,
    row_likelihoods,
    settings_for,
    unadapted,
    with_prior,
)
from fedp2eft.methods.auto.settings import AutoSettings
from fedp2eft.progress import current


class _LeftError(Exception):
    """The client leaves the adapter that is being fine-tuned for something that trains nothing."""

    def __init__(self, better: Candidate) -> None:
        super().__init__(str(better))
        self.better = better


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
    tried = to_try(client, chosen, adapter)
    try:
        if tried and client.own.hold_out == "half" and (steps := half_steps(client, tried)):
            return after_half(client, chosen, tried, steps)
        return _fitted(client, decide(client, chosen, tried))
    except DivergedError:
        current().note("A client's fine-tuning diverged: auto trains nothing there.")
        return _fitted(client, Candidate("prior" if has_classes(client) else "base"))


def _fitted(client: ClientSide, candidate: Candidate) -> Outcome:
    return replace(fit(client, candidate), choice=candidate.kind)


def checks(client: ClientSide) -> bool:
    """Return whether the client holds rows out: it has enough of them, and `auto.guard` is on."""
    return bool(client.own.guard) and len(client.train) >= client.own.min_rows


def to_try(client: ClientSide, chosen: Candidate, adapter: Candidate) -> Candidate | None:
    """Return the candidate that the client fine-tunes to check it; None if it checks none.

    Args:
        client: The client.
        chosen: The federation's choice.
        adapter: The best candidate that trains; tried where the choice trains nothing.
    """
    own: AutoSettings = client.own
    if not checks(client):
        return None
    tried = adapter if chosen.kind in FREE and own.try_adapter else chosen
    return None if tried.kind in FREE else tried


def untrained(client: ClientSide) -> list[Candidate]:
    """Return what a client can have without training: the base, and its label prior."""
    return [Candidate("base"), *([Candidate("prior")] if has_classes(client) else [])]


def half_steps(client: ClientSide, candidate: Candidate) -> int:
    """Return the optimizer steps that a fine-tuning takes on the first half of the rows alone."""
    rows = len(folds(client, 2)[0])
    settings = settings_for(client, candidate)
    per_epoch = -(-rows // settings.batch_size)
    return settings.personalize_epochs * per_epoch // settings.accumulate


def after_half(client: ClientSide, chosen: Candidate, tried: Candidate, steps: int) -> Outcome:
    """Fine-tune a candidate; leave it after the first half if the other rows prefer another one.

    Args:
        client: The client.
        chosen: The federation's choice.
        tried: What is fine-tuned: the choice, or an adapter where the choice trains nothing.
        steps: Optimizer steps of the first half.
    """
    first, rest = folds(client, 2)
    settings = settings_for(client, tried)
    epochs, size = settings.personalize_epochs, settings.batch_size
    order = [
        rows[batch]
        for rows in (first, rest)
        for batch in local_order(len(rows), epochs, size, client.seed)
    ]
    held, base = client.train.select(rest), unadapted(client.plain())
    # Held-out labels are not in the label prior that they are compared under.
    half = replace(client.plain(), train=client.train.select(first))
    task = with_prior(half, base.values[torch.from_numpy(first)]).task
    found = {
        each: base.rows(half.task if each.kind == "base" else task, rest)
        for each in untrained(client)
    }

    def after(step: int, model: nn.Module) -> None:
        if step != steps:
            return
        found[tried] = row_likelihoods(task, model, held, settings.eval_batch_size)
        better = preferred(found, chosen, client.own.noise)
        if better != tried:
            raise _LeftError(better)

    try:
        outcome = fit(client, tried, base.values, order=order, after=after)
        return replace(outcome, choice=tried.kind)
    except _LeftError as left:
        return _fitted(client, left.better)


def decide(client: ClientSide, chosen: Candidate, tried: Candidate | None) -> Candidate:
    """Return what the client personalizes with, by all of its rows (`auto.hold_out: folds`).

    Args:
        client: The client.
        chosen: The federation's choice.
        tried: What is fine-tuned to check it, if anything is.
    """
    own: AutoSettings = client.own
    if not own.guard:
        return chosen
    if not checks(client):
        current().note(
            f"A client has {len(client.train)} training rows, too few to hold some out "
            f"(auto.min_rows is {own.min_rows}): it follows the federation's choice, {chosen}."
        )
        return chosen
    others = [*untrained(client), *([tried] if tried else [])]
    compared = [*(each for each in others if each != chosen), chosen]
    found = held_out(client, compared, folds(client, own.folds))
    return preferred(dict(zip(compared, found, strict=True)), chosen, own.noise)


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
