"""What one client does: its features, the two stages of a round, and personalization.

Functions of (adapter, data, φ, settings). Nothing here knows of a network or a federation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fedp2eft.adapters.btlora import BTLora, PriorLoss
from fedp2eft.adapters.budget import keep_largest
from fedp2eft.adapters.weights import AdapterWeights
from fedp2eft.client.features import client_features
from fedp2eft.errors import DivergedError, UserError
from fedp2eft.generator import PSG
from fedp2eft.modes import in_mode
from fedp2eft.settings.experiment import GeneratorSettings, LocalSettings
from fedp2eft.settings.profiles import Profile
from fedp2eft.tasks.encoded import Encoded, epoch_batches
from fedp2eft.tasks.task import RowsLoss, Task

Rows = NDArray  # type: ignore[type-arg]
PartsOf = Callable[[Rows], Sequence[tuple[Rows, float]]]
Order = Sequence[Sequence[int]] | Sequence[NDArray]  # type: ignore[type-arg]
OnStep = Callable[[float], None]
# What one more pass through the model costs on a CPU, in positions (benchmarks/split.py).
PASS_TOKENS = 128
# Tokens of one pass of packed rows: what it keeps for its backward pass grows with them.
MOST_TOKENS = 4096


@dataclass(frozen=True)
class LossTerms:
    """L of one optimiser step as the sum of its terms, each with its weight.

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
        stage1_losses: L at every optimiser step of stage 1.
        lam: λ^s, L × r_max.
        stage1_terms: What the last of `stage1_losses` is the sum of; zeros where there is none.
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
        losses: Task loss at every optimiser step.
    """

    weights: AdapterWeights
    lam: Tensor
    losses: list[float]


def features(
    bt: BTLora, task: Task, data: Encoded, settings: LocalSettings, profile: Profile
) -> Tensor:
    """ξ of a client's training rows (2M values), adapters off."""
    if not len(data):
        raise UserError("This client has no training rows, so it has no features: give it text.")
    if profile.feature_batch_size is None:
        batches = task.feature_batches(data, settings.eval_batch_size)
    else:
        batches = task.padded_batches(data, profile.feature_batch_size)
    with bt.off():
        xi = client_features(bt.model, bt.linears, batches, masked=profile.masked_features)
    if not bool(torch.isfinite(xi).all()):
        raise UserError("ξ holds NaN or infinity: check the client's text and the base model.")
    return xi


def descend(
    model: nn.Module,
    loss_of: Callable[[NDArray], Tensor],  # type: ignore[type-arg]
    order: Iterable[NDArray],  # type: ignore[type-arg]
    optimizer: torch.optim.Optimizer,
    weights: Sequence[nn.Parameter],
    settings: LocalSettings,
    *,
    zero: Sequence[nn.Parameter] | None = None,
    seed: int = 0,
    on_step: OnStep | None = None,
    parts_of: PartsOf | None = None,
    prior: Callable[[], Tensor] | None = None,
    on_last: OnStep | None = None,
) -> list[float]:
    """Run an optimiser over mini-batches; the one training loop of the package.

    Args:
        model: In training mode while this runs (`settings.dropout`).
        loss_of: Loss of the rows with the given numbers.
        order: Mini-batches of row numbers.
        optimizer: Steps once per `settings.accumulate` mini-batches.
        weights: Clipped together to `settings.max_grad_norm`.
        settings: Clip, accumulation, dropout.
        zero: Parameters whose gradients are zeroed before a step (all of the optimiser's where
            none are given).
        seed: Seed of the base model's own dropout; the global random state is left as it was.
        on_step: Called with the loss of every step.
        parts_of: Rows of a mini-batch that go through the model together, with their share of its
            loss; the gradients add up to those of the whole mini-batch. All at once by default.
        prior: What the rows have no part in, added to the loss of every mini-batch.
        on_last: Called after the last step with its loss without `prior`.

    Returns:
        The loss of every optimiser step (mean over its mini-batches).

    Raises:
        DivergedError: The loss is not finite.
    """
    losses: list[float] = []
    fits: list[Tensor] = []
    size = 0
    batches = iter(order)
    read_once = _gates_read_once(model)
    with _training(model, settings.dropout, seed):
        while group := list(islice(batches, settings.accumulate)):
            if zero is None:
                optimizer.zero_grad()
            else:
                for parameter in zero:
                    parameter.grad = None
            total, fits, size = 0.0, [], len(group)
            for rows in group:
                rest = prior
                for part, share in parts_of(rows) if parts_of else [(rows, 1.0)]:
                    with read_once():
                        loss = loss_of(part) * share
                        fits.append(loss.detach())  # read once, at the end
                        if rest:
                            loss, rest = loss + rest(), None
                        loss = loss / size
                    loss.backward()  # type: ignore[no-untyped-call]
                    total += loss.item()
            if not math.isfinite(total):
                raise not_finite(total, len(losses) + 1)
            nn.utils.clip_grad_norm_(weights, settings.max_grad_norm)
            optimizer.step()
            losses.append(total)
            if on_step:
                on_step(total)
    if on_last and losses:
        on_last(sum(fit.item() for fit in fits) / size)
    return losses


def not_finite(loss: float, step: int) -> DivergedError:
    """The error of a local run whose loss is NaN or infinite at a step (counted from 1)."""
    return DivergedError(
        f"The loss is {loss} at step {step}: lower the learning rates, or "
        "check the text and the base model."
    )


def rows_loss(task: Task, model: nn.Module, data: Encoded) -> tuple[RowsLoss, PartsOf | None]:
    """The task loss of some rows, and how a mini-batch is cut before it: see `descend`.

    On a CPU a position of padding costs its full time: rows are packed where the model takes that,
    cut into parts of similar length where it does not. A GPU takes a whole mini-batch in less time
    than its parts.
    """
    packed = task.packed_loss(model, data)
    if packed is not None:
        return packed, lambda rows: data.passes(rows, MOST_TOKENS)
    return lambda rows: task.loss(model, task.batch(data, rows)), length_parts(task, data)


def length_parts(task: Task, data: Encoded) -> PartsOf | None:
    """Parts of similar length on a CPU, None elsewhere."""
    if torch.device(task.device).type != "cpu":
        return None
    return lambda rows: data.parts(rows, PASS_TOKENS)


@contextmanager
def _training(model: nn.Module, dropout: bool, seed: int) -> Iterator[None]:
    """The model's own dropout on, drawn from `seed`; mode and global random state come back.

    Gradient checkpointing works in training mode alone, so a model that has it is in it without
    dropout too (`workspace` refuses one that would drop out all the same).
    """
    training = dropout or getattr(model, "is_activation_checkpointing", False)
    with torch.random.fork_rng(enabled=dropout), in_mode(model, training):
        if dropout:
            torch.manual_seed(seed)
        yield


def stage1(
    bt: BTLora,
    task: Task,
    data: Encoded,
    order: Iterable[NDArray],  # type: ignore[type-arg]
    settings: LocalSettings,
    profile: Profile,
    *,
    seed: int = 0,
    on_step: OnStep | None = None,
    on_terms: Callable[[LossTerms], None] | None = None,
) -> list[float]:
    """Minimise L over (A, B, λ) from the adapter as it stands; returns L of every step.

    λ^s is in `bt.lam` afterwards. `on_terms` is called after the last step with the terms of its L.
    (Paper algorithm 1, client side; objective in `fedp2eft.adapters.btlora`.)
    """
    weights = bt.A + bt.B
    optimizer = adamw(
        [
            {"params": weights, "lr": settings.lr},
            {"params": [bt.lam], "lr": settings.lambda_lr},
        ]
    )

    task_loss, parts_of = rows_loss(task, bt.model, data)

    def loss_of(rows: Rows) -> Tensor:
        return settings.alpha_task * task_loss(rows)

    last: PriorLoss

    def prior() -> Tensor:
        nonlocal last
        last = bt.prior_loss(len(data), settings.alpha_s, settings.alpha_p)
        return last.total

    def tell(task_loss: float) -> None:
        if on_terms:
            on_terms(LossTerms(task_loss, *(term.item() for term in last.terms())))

    return descend(
        bt.model,
        loss_of,
        order,
        optimizer,
        weights,
        settings,
        zero=None if profile.zero_lambda_grad else weights,
        seed=seed,
        on_step=on_step,
        parts_of=parts_of,
        prior=prior,
        on_last=tell,
    )


def stage2(psg: PSG, xi: Tensor, target: Tensor, settings: GeneratorSettings) -> float:
    """Move φ towards predicting λ^s from ξ: Adam on Σ|PSG(ξ; φ) − λ^s|, a fresh optimiser.

    Args:
        psg: Changed in place.
        xi: ξ.
        target: λ^s, L × r_max (or L × 1).
        settings: Steps and learning rate.

    Returns:
        The mean loss over the steps.
    """
    optimizer = torch.optim.Adam(psg.parameters(), lr=settings.lr)
    total = 0.0
    for _ in range(settings.steps):
        optimizer.zero_grad()
        loss = (psg(xi) - target).abs().sum()
        loss.backward()
        optimizer.step()
        total += loss.item()
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
    """One client's part of a federated round: λ⁰ = PSG(ξ), stage 1, stage 2.

    Args:
        bt: The shared adapter; reset first, thrown away by the next client's reset.
        task: Loss of the client's rows.
        data: The client's training rows.
        xi: The client's features, log N included where the PSG wants it.
        psg: Holds φ of the server; changed in place.
        order: Mini-batches of row numbers.
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
    psg_loss = stage2(psg, xi, target, generator)
    lam = bt.rank_lambda().cpu()
    return Round(psg.numbers(), len(data), psg_loss, losses, lam, terms[-1])


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
        order: Mini-batches of row numbers.
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


def rate_groups(weights: Sequence[nn.Parameter], rates: Tensor) -> list[dict[str, object]]:
    """Parameter groups of one matrix each, at learning rates in the order of the matrices."""
    lrs = rates.flatten().tolist()
    return [{"params": [w], "lr": lr} for w, lr in zip(weights, lrs, strict=True)]


def structure(psg: PSG, xi: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """λ and kept ranks that the PSG predicts for a client: (λ, mask), both L × r_max."""
    with torch.no_grad():
        return cut_to(rank, psg(xi), psg.config.r_max)


def cut_to(rank: int, lam: Tensor, r_max: int) -> tuple[Tensor, Tensor]:
    """Return λ (L × r_max or L × 1) and its r·L largest entries: (λ, mask), both L × r_max."""
    lam = lam.expand(-1, r_max).contiguous()
    return lam, keep_largest(lam, rank)


def local_order(rows: int, epochs: int, batch_size: int, seed: int) -> Iterator[NDArray]:  # type: ignore[type-arg]
    """Mini-batches of one local run; no training rows is a `UserError`."""
    if rows == 0:
        raise UserError("This client has no training rows: give it text, or leave it out.")
    return epoch_batches(rows, epochs, batch_size, seed)


def _gates_read_once(model: nn.Module) -> Callable[[], AbstractContextManager[None]]:
    """PEFT reads each gated A more than once per forward; what this opens computes it once.

    Not under gradient checkpointing: the second forward, in the backward pass, must do exactly what
    the first did. (Asked once a run: transformers looks through all modules to answer.)
    """
    if getattr(model, "is_activation_checkpointing", False):
        return nullcontext
    return parametrize.cached


def adamw(groups: list[dict[str, object]]) -> torch.optim.Optimizer:
    """AdamW as the paper uses it: β 0.9/0.999, ε 1e-8, no weight decay, constant rate."""
    # fused: one pass over each tensor instead of a dozen
    return torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, fused=True)
