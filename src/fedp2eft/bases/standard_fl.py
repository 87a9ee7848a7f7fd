"""Standard FL: FedAvg of full fine-tuning, before any adapter (paper section 5, base models)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedp2eft.client import OnStep, adamw, descend
from fedp2eft.settings import BaseSettings, LocalSettings
from fedp2eft.tasks.classification import Classification
from fedp2eft.tasks.encoded import Encoded


def trained_parameters(model: nn.Module, settings: BaseSettings) -> dict[str, nn.Parameter]:
    """The parameters that are trained and travel, by name.

    Without `train_embeddings` the input embeddings stay as they are (an output layer tied to them
    does too).
    """
    embeddings: set[int] = set()
    if not settings.train_embeddings:
        embeddings = {id(p) for p in model.get_input_embeddings().parameters()}  # type: ignore[operator]
    return {name: p for name, p in model.named_parameters() if id(p) not in embeddings}


@torch.no_grad()
def set_parameters(model: nn.Module, numbers: dict[str, Tensor], settings: BaseSettings) -> None:
    """Copy numbers into the trained parameters."""
    for name, parameter in trained_parameters(model, settings).items():
        parameter.copy_(numbers[name])


def fine_tune(
    model: nn.Module,
    task: Classification,
    data: Encoded,
    order: Iterable[NDArray],  # type: ignore[type-arg]
    settings: BaseSettings,
    local: LocalSettings,
    dtype: torch.dtype,
    seed: int,
    on_step: OnStep | None = None,
) -> list[float]:
    """One client's local run of full fine-tuning, in place; returns the loss of every step.

    Args:
        model: fp32 weights.
        task: Loss of the client's rows.
        data: The client's training rows.
        order: Mini-batches of row numbers.
        settings: Learning rate, and whether embeddings are trained.
        local: Gradient clip and accumulation.
        dtype: Numbers of the matrix products (autocast); the weights stay fp32.
        seed: Seed of the model's own dropout.
        on_step: Called with the loss of every step.
    """
    trained = trained_parameters(model, settings)
    model.requires_grad_(False)
    for parameter in trained.values():
        parameter.requires_grad_(True)
    weights = list(trained.values())
    device = weights[0].device.type

    def loss_of(rows: NDArray) -> Tensor:  # type: ignore[type-arg]
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            return task.loss(model, task.batch(data, rows))

    optimizer = adamw([{"params": weights, "lr": settings.lr}])
    losses = descend(model, loss_of, order, optimizer, weights, local, seed=seed, on_step=on_step)
    optimizer.zero_grad(set_to_none=True)
    return losses
