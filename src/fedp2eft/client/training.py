"""What one client does: its features, the two stages of a round, and personalization.

Functions of (adapter, data, φ, settings). Nothing here knows of a network or a federation.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedp2eft.adapters.btlora import BTLora, PriorLoss
from fedp2eft.adapters.budget import keep_largest
from fedp2eft.adapters.weights import AdapterWeights
from fedp2eft.client.descent import (
    Indices,
    OnStep,
    adamw,
    descend,
    rate_groups,
    rows_loss,
    steps_of,
)
from fedp2eft.client.features import client_features
from fedp2eft.errors import DivergedError, UserError
from fedp2eft.generator import PSG
from fedp2eft.modes import in_mode
from fedp2eft.settings.experiment import GeneratorSettings, LocalSettings
from fedp2eft.settings.profiles import Profile
from fedp2eft.tasks.encoded import Encoded
from fedp2eft.tasks.task import Task


@dataclass(frozen=True)
class LossTerms:
    """L of one optimizer step as the sum of its terms, each with its weight.

    Args:
        task: α_task · task loss.
        significance: What holds B at its start.
        sparsity: What λ itself costs.
    """

    task: float = 0.0
    significance: float = 0.0
    sparsity: float = 0.0


@dataclass(frozen=True)
class Round:
    """What a client's round gives. φ, N and the losses leave the client, λ^s does not.

    Args:
        phi: φ after stage 2.
        examples: N, training rows.
        psg_loss: Mean over the steps of stage 2 of Σ|λ̂ − λ^s|.
        stage1_losses: L at every optimizer step of stage 1.
        lam: λ^s, L × r_max.
        stage1_terms: What the last of `stage1_losses` is the sum of; zeros if absent.
    """

    phi: dict[str, Tensor]
    examples: int
    psg_loss: float
    stage1_losses: list[float]
    lam: Tensor
    stage1_terms: LossTerms


@dataclass(frozen=True)
class Fitted:
    """A personalized adapter.

    Args:
        weights: The kept ranks of A and B with their λ.
        lam: λ with zeros where a rank was dropped, L × r_max.
        losses: Task loss at every optimizer step.
    """

    weights: AdapterWeights
    lam: Tensor
    losses: list[float]


def features(
    bt: BTLora, task: Task, data: Encoded, settings: LocalSettings, profile: Profile
) -> Tensor:
    """Return ξ of a client's training rows (2M values), adapters off."""
    if not len(data):
        raise UserError("This client has no training rows, so it has no features: give it text.")
    size = profile.feature_batch_size
    # Fine-tuning, in its mode, starts from states of frozen lower blocks: this pass has them too.
    keeping = task.keeping_states(bt.model, data) if size is None else nullcontext()
    with bt.off(), in_mode(bt.model, settings.dropout), keeping as kept_by:
        if size is None:
            batches = task.feature_batches(data, kept_by or settings.eval_batch_size)
        else:
            batches = task.padded_batches(data, size)
        xi = client_features(bt.model, bt.linears, batches, masked=profile.masked_features)
    if not bool(torch.isfinite(xi).all()):
        raise UserError("ξ holds NaN or infinity: check the client's text and the base model.")
    return xi


class Trainable(Protocol):
    """The adapter that stage 1 trains, of one client (`BTLora`) or of several (`StackedLora`)."""

    lam: nn.Parameter

    @property
    def weights(self) -> list[nn.Parameter]:
        """Every A and B."""

    def prior_loss(self, examples: Any, alpha_s: float, alpha_p: float) -> PriorLoss:
        """Return the penalties, one value or one per client."""


def minimise(
    adapter: Trainable,
    model: nn.Module,
    loss_of: Callable[[Any], Tensor],
    order: Sequence[Any],
    examples: int | Tensor,
    ends: Collection[int],
    settings: LocalSettings,
    profile: Profile,
    **how: Any,
) -> tuple[list[Any], dict[int, tuple[Tensor, ...]]]:
    """Run stage 1, of one client or several in one batch: minimise L over (A, B, λ).

    (Paper algorithm 1, client side; objective in `fedp2eft.adapters.btlora`.)

    Args:
        adapter: Trained from where it is.
        model: The base model with the adapter.
        loss_of: Task loss of a mini-batch, one value or one per client.
        order: Mini-batches.
        examples: N, likewise.
        ends: Steps (from 1) after which something is to be remembered.
        settings: Learning rates, weights of the terms, clip, accumulation.
        profile: `paper` or `reference`.
        how: Further arguments of `descend`.

    Returns:
        L at every step; and for each step of `ends` λ after it and the terms of its L: task,
        significance, sparsity.
    """
    weights = adapter.weights
    optimizer = adamw(
        [
            {"params": weights, "lr": settings.lr},
            {"params": [adapter.lam], "lr": settings.lambda_lr},
        ]
    )
    last: PriorLoss
    remembered: dict[int, tuple[Tensor, ...]] = {}

    def prior() -> Tensor:
        nonlocal last
        last = adapter.prior_loss(examples, settings.alpha_s, settings.alpha_p)
        return last.total

    def after(step: int, fits: list[Tensor], size: int | Tensor) -> None:
        if step in ends:
            fit = torch.stack(fits).double().sum(dim=0) / size
            remembered[step] = (adapter.lam.detach().clone(), fit, *last.terms())

    losses = descend(
        model,
        lambda rows: settings.alpha_task * loss_of(rows),
        order,
        optimizer,
        weights,
        settings,
        zero=None if profile.zero_lambda_grad else weights,
        prior=prior,
        after=after,
        **how,
    )
    return losses, remembered


def stage1(
    bt: BTLora,
    task: Task,
    data: Encoded,
    order: Iterable[Indices],
    settings: LocalSettings,
    profile: Profile,
    *,
    seed: int = 0,
    on_step: OnStep | None = None,
    on_terms: Callable[[LossTerms], None] | None = None,
) -> list[float]:
    """Run `minimise` for one client; return L of every step.

    λ^s is in `bt.lam` afterwards. `on_terms` is called after the last step with the terms of its L.
    """
    order = list(order)
    task_loss, parts_of = rows_loss(task, bt.model, data)
    losses, remembered = minimise(
        bt, bt.model, task_loss, order, len(data), {steps_of(order, settings)}, settings, profile,
        seed=seed, on_step=on_step, parts_of=parts_of,
    )  # fmt: skip
    if on_terms:
        for _lam, *terms in remembered.values():
            on_terms(LossTerms(*(term.item() for term in terms)))
    return losses


def stage2(psg: nn.Module, xi: Tensor, target: Tensor, settings: GeneratorSettings) -> Tensor:
    """Move φ towards predicting λ^s from ξ: Adam on Σ|PSG(ξ; φ) − λ^s|, a fresh optimizer.

    Args:
        psg: The PSG, or several clients' (`StackedPSG`); changed in place.
        xi: ξ, of several clients C × features.
        target: λ^s, L × r_max (or L × 1), of several clients C × L × r_max.
        settings: Steps and learning rate.

    Returns:
        The mean loss over the steps, one value or one per client, in float64.
    """
    optimizer = torch.optim.Adam(psg.parameters(), lr=settings.lr)
    total = torch.zeros(target.shape[:-2], dtype=torch.float64, device=target.device)
    for _ in range(settings.steps):
        optimizer.zero_grad()
        loss = (psg(xi) - target).abs().sum(dim=(-2, -1))
        loss.sum().backward()
        optimizer.step()
        total += loss.detach()
    return total / max(1, settings.steps)


def train_round(
    bt: BTLora,
    task: Task,
    data: Encoded,
    xi: Tensor,
    psg: PSG,
    order: Iterable[NDArray],  # type: ignore[type-arg]
    settings: LocalSettings,
    generator: GeneratorSettings,
    profile: Profile,
    *,
    seed: int = 0,
    on_step: OnStep | None = None,
) -> Round:
    """Run one client's part of a federated round: λ⁰ = PSG(ξ), stage 1, stage 2.

    Args:
        bt: The shared adapter; reset first, thrown away by the next client's reset.
        task: Loss of the client's rows.
        data: The client's training rows.
        xi: The client's features, log N included where the PSG wants it.
        psg: Holds φ of the server; changed in place.
        order: Mini-batches of row indices.
        settings: Stage 1.
        generator: Stage 2.
        profile: `paper` or `reference`.
        seed: Seed of the base model's own dropout.
        on_step: Called with L of every step.
    """
    with torch.no_grad():
        lam = psg(xi)
    bt.reset(lam.to(bt.lam.device))
    terms = [LossTerms()]
    losses = stage1(
        bt, task, data, order, settings, profile,
        seed=seed, on_step=on_step, on_terms=terms.append,
    )  # fmt: skip
    target = bt.clamped(bt.lam) if profile.clamp_target else bt.lam
    target = target.detach().cpu().clone()
    psg_loss = stage2(psg, xi, target, generator).item()
    lam = bt.rank_lambda().cpu()
    return Round(psg.phi(), len(data), psg_loss, losses, lam, terms[-1])


def personalize(
    bt: BTLora,
    task: Task,
    data: Encoded,
    lam: Tensor,
    keep: Tensor,
    order: Iterable[NDArray],  # type: ignore[type-arg]
    settings: LocalSettings,
    *,
    rates: Tensor | None = None,
    seed: int = 0,
    on_step: OnStep | None = None,
    measure: Callable[[nn.Module], None] | None = None,
) -> Fitted:
    """Fine-tune the kept rows of A and columns of B with λ frozen (paper section 4, inference).

    Args:
        bt: The shared adapter; unchanged afterwards.
        task: Loss of the client's rows.
        data: The client's training rows.
        lam: λ, L × r_max.
        keep: Kept ranks, boolean L × r_max.
        order: Mini-batches of row indices.
        settings: Learning rate, clip, dropout.
        rates: Learning rates of A and of B of each layer, L × 2, in place of the one of `settings`.
        seed: Seed of the base model's own dropout.
        on_step: Called with the task loss of every step.
        measure: Called with the personalized model before the adapter is taken away.
    """
    with bt.trimmed(lam.to(bt.lam.device), keep.to(bt.lam.device)) as trimmed:
        weights = trimmed.parameters()
        groups: list[dict[str, object]] = [{"params": weights, "lr": settings.personalize_lr}]
        if rates is not None:
            groups = rate_groups(weights, rates[keep.any(dim=1)])
        loss_of, parts_of = rows_loss(task, bt.model, data)
        losses = descend(
            bt.model,
            loss_of,
            order,
            adamw(groups),
            weights,
            settings,
            seed=seed,
            on_step=on_step,
            parts_of=parts_of,
        )
        fitted = Fitted(trimmed.weights(), trimmed.lam.cpu(), losses)
        if not fitted.weights.is_finite():
            raise DivergedError("The personalized adapter holds NaN: lower local.personalize_lr.")
        if measure:
            measure(bt.model)
        return fitted


def structure(
    psg: PSG, xi: Tensor, rank: int, costs: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """Return λ and kept ranks that the PSG predicts for a client: (λ, mask), both L × r_max."""
    with torch.no_grad():
        return cut_to(rank, psg(xi), psg.config.adapter.r_max, costs)


def cut_to(
    rank: int, lam: Tensor, r_max: int, costs: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """Return λ (L × r_max or L × 1) and what `keep_largest` keeps: (λ, mask), both L × r_max."""
    lam = lam.expand(-1, r_max).contiguous()
    return lam, keep_largest(lam, rank, costs)
