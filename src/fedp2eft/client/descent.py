"""The training loop that every local run goes through: mini-batches, losses, the optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache
from itertools import islice
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fedp2eft.errors import DivergedError, UserError
from fedp2eft.modes import in_mode
from fedp2eft.settings.experiment import LocalSettings
from fedp2eft.tasks.encoded import Encoded, epoch_batches
from fedp2eft.tasks.task import RowsLoss, Task

Indices = NDArray  # type: ignore[type-arg]
PartsOf = Callable[[Indices], Sequence[tuple[Indices, float]]]
OnStep = Callable[[float], None]
Clip = Callable[[Sequence[nn.Parameter], float], Any]
# What one more pass through the model costs on a CPU, in positions (benchmarks/split.py).
PASS_TOKENS = 128


_STEPS = ContextVar("optimizer steps", default=0)


def steps_taken() -> int:
    """Return how many optimizer steps `descend` has taken in this thread."""
    return _STEPS.get()


def local_order(rows: int, epochs: int, batch_size: int, seed: int) -> Iterator[NDArray]:  # type: ignore[type-arg]
    """Return mini-batches of one local run; no training rows is a `UserError`."""
    if rows == 0:
        raise UserError("This client has no training rows: give it text, or leave it out.")
    return epoch_batches(rows, epochs, batch_size, seed)


def steps_of(order: Sequence[Any], settings: LocalSettings) -> int:
    """Return optimizer steps over so many mini-batches."""
    return -(-len(order) // settings.accumulate)


def rows_loss(task: Task, model: nn.Module, data: Encoded) -> tuple[RowsLoss, PartsOf | None]:
    """Return the task loss of some rows, and how to cut a mini-batch first: see `descend`.

    On a CPU a position of padding costs its full time: rows are packed where the model takes that,
    cut into parts of similar length where it does not. A GPU takes a whole mini-batch in less time
    than its parts.
    """
    packed = task.packed_loss(model, data)
    if packed is not None:
        return packed, lambda rows: data.passes(rows, task.most_tokens)
    return padded_loss(task, model, data), length_parts(task, data)


def padded_loss(task: Task, model: nn.Module, data: Encoded) -> RowsLoss:
    """The task loss of some rows, padded to the longest of them."""
    # Looked up by the first mini-batch: the model is in its mode by then.
    ready = cache(lambda: task.with_states(model, data))
    return lambda rows: task.loss(model, task.batch(ready(), rows))


def length_parts(task: Task, data: Encoded) -> PartsOf | None:
    """Return parts of similar length on a CPU, None elsewhere."""
    if torch.device(task.device).type != "cpu":
        return None
    return lambda rows: data.parts(rows, PASS_TOKENS)


def adamw(groups: list[dict[str, object]]) -> torch.optim.Optimizer:
    """Return AdamW as the paper uses it: β 0.9/0.999, ε 1e-8, no weight decay, constant rate."""
    # fused: one pass over each tensor instead of a dozen
    return torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, fused=True)


def rate_groups(weights: Sequence[nn.Parameter], rates: Tensor) -> list[dict[str, object]]:
    """Return parameter groups of one matrix each, with learning rates in matrix order."""
    lrs = rates.flatten().tolist()
    return [{"params": [w], "lr": lr} for w, lr in zip(weights, lrs, strict=True)]


def descend(
    model: nn.Module,
    loss_of: Callable[[Any], Tensor],
    order: Iterable[Any],
    optimizer: torch.optim.Optimizer,
    weights: Sequence[nn.Parameter],
    settings: LocalSettings,
    *,
    zero: Sequence[nn.Parameter] | None = None,
    seed: int = 0,
    on_step: Callable[[Any], None] | None = None,
    parts_of: PartsOf | None = None,
    prior: Callable[[], Tensor] | None = None,
    after: Callable[[int, list[Tensor], int | Tensor], None] | None = None,
    clip: Clip = nn.utils.clip_grad_norm_,
    sizes: Callable[[Sequence[Any]], int | Tensor] = len,
    check: Callable[[Any, int], None] | None = None,
) -> list[Any]:
    """Run an optimizer over mini-batches; the one training loop of the package.

    Args:
        model: In training mode while this runs (`settings.dropout`).
        loss_of: Loss of a mini-batch: one value, or one per client.
        order: Mini-batches: row indices, or whatever `loss_of` takes.
        optimizer: Steps once per `settings.accumulate` mini-batches.
        weights: Clipped together to `settings.max_grad_norm`.
        settings: Clip, accumulation, dropout.
        zero: Parameters whose gradients are zeroed before a step; all of the optimizer's by
            default.
        seed: Seed of the base model's own dropout; the global random state is left as it was.
        on_step: Called with the loss of every step.
        parts_of: Rows of a mini-batch that go through the model together, with their share of its
            loss; the gradients add up to those of the whole mini-batch. All at once by default.
        prior: What does not depend on the rows, added to the loss of every mini-batch.
        after: Called after every step with its number (from 1), its losses without `prior`, and
            what their sum is divided by.
        clip: Clips the gradients of `weights`, by default those of all together.
        sizes: By what the losses of a step's mini-batches are divided, by default their number.
        check: Called with the loss and the number of every step before the optimizer steps; by
            default a loss that is not finite is an error.

    Returns:
        The loss of every optimizer step (mean over its mini-batches).

    Raises:
        DivergedError: The loss is not finite.
    """
    losses: list[Any] = []
    batches, check = iter(order), check or _finite
    read_once = _gates_read_once(model)
    with _training(model, settings.dropout, seed):
        while group := list(islice(batches, settings.accumulate)):
            if zero is None:
                optimizer.zero_grad()
            else:
                for parameter in zero:
                    parameter.grad = None
            # Losses stay on the device until the end of the step: reading one waits for it.
            found: list[Tensor] = []
            fits: list[Tensor] = []
            size = sizes(group)
            for rows in group:
                rest = prior
                for part, share in parts_of(rows) if parts_of else [(rows, 1.0)]:
                    with read_once():
                        loss = loss_of(part) * share
                        fits.append(loss.detach())
                        if rest:
                            loss, rest = loss + rest(), None
                        loss = loss / size
                    loss.sum().backward()  # type: ignore[no-untyped-call]
                    found.append(loss.detach())
            values = _sum_of(found)
            check(values, len(losses) + 1)
            clip(weights, settings.max_grad_norm)
            optimizer.step()
            _STEPS.set(_STEPS.get() + 1)
            losses.append(values)
            if after:
                after(len(losses), fits, size)
            if on_step:
                on_step(values)
    return losses


def _sum_of(losses: list[Tensor]) -> Any:
    """Return the sum as a number, or as a list of one number per client."""
    values = [loss.tolist() for loss in losses]
    return (
        sum(values) if losses[0].dim() == 0 else [sum(mine) for mine in zip(*values, strict=True)]
    )


def _finite(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise not_finite(loss, step)


def not_finite(loss: float, step: int) -> DivergedError:
    """Return the error of a local run whose loss is NaN or infinite at a step (counted from 1)."""
    return DivergedError(
        f"The loss is {loss} at step {step}: lower the learning rates, or "
        "check the text and the base model."
    )


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


def _gates_read_once(model: nn.Module) -> Callable[[], AbstractContextManager[None]]:
    """PEFT reads each gated A more than once per forward; what this opens computes it once.

    Not under gradient checkpointing: the second forward, in the backward pass, must do exactly what
    the first did. (Asked once per run: transformers looks through all modules to answer.)
    """
    if getattr(model, "is_activation_checkpointing", False):
        return nullcontext
    return parametrize.cached
