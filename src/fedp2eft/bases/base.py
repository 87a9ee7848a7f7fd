"""Federated training of the base model: what a client trains, what travels and what stays.

The base is trained before any PSG. The result is one ordinary model, the same for all clients; some
kinds also leave every client a part of its own, which never travels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedp2eft.adapters.weights import AdapterWeights
from fedp2eft.bases.parts import Part, Replacement
from fedp2eft.client.descent import OnStep, adamw, descend, local_order, rows_loss
from fedp2eft.settings.experiment import BaseSettings, Settings
from fedp2eft.tasks.encoded import Encoded
from fedp2eft.tasks.task import Task


@dataclass(frozen=True)
class LocalWork:
    """One client's local run on the base.

    Args:
        client: Its name.
        task: Loss of the client's rows.
        data: The client's training rows.
        settings: The experiment.
        dtype: Of the matrix products (autocast); the weights stay fp32.
        seed: Seed of the mini-batch order and of dropout.
        on_step: Called with the loss of every step.
    """

    client: str
    task: Task
    data: Encoded
    settings: Settings
    dtype: torch.dtype
    seed: int
    on_step: OnStep | None = None

    def order(self) -> list[NDArray]:  # type: ignore[type-arg]
        """Return mini-batches of row indices: `base.epochs` passes, or what `base.steps` take."""
        s = self.settings.base
        if s.steps is None:
            return list(local_order(len(self.data), s.epochs, s.batch_size, self.seed))
        size = s.steps * self.settings.local.accumulate
        return list(islice(local_order(len(self.data), size, s.batch_size, self.seed), size))

    def fine_tune(self, model: nn.Module, trained: Iterable[nn.Parameter], lr: float) -> float:
        """Train the given parameters in place, nothing else; returns the mean loss of the steps."""
        weights, local = list(trained), self.settings.local
        model.requires_grad_(False)
        for parameter in weights:
            parameter.requires_grad_(True)
        device = weights[0].device.type
        task_loss, parts_of = rows_loss(self.task, model, self.data)

        def loss_of(rows: NDArray) -> Tensor:  # type: ignore[type-arg]
            with torch.autocast(device, self.dtype, enabled=self.dtype != torch.float32):
                return task_loss(rows)

        optimizer = adamw([{"params": weights, "lr": lr}])
        losses = descend(
            model, loss_of, self.order(), optimizer, weights, local,
            seed=self.seed, on_step=self.on_step, parts_of=parts_of,
        )  # fmt: skip
        optimizer.zero_grad(set_to_none=True)
        return float(sum(losses) / max(1, len(losses)))


class BaseTraining:
    """How the base is trained. This one trains nothing (off the shelf); subclasses override."""

    private = False
    """Whether clients keep parts of the base of their own, so that no two share a batch."""

    def wrap(self, model: nn.Module, settings: Settings) -> nn.Module:
        """Return the model as it is trained: plain, or with an adapter that changes nothing yet."""
        return model

    def trained(self, model: nn.Module, settings: BaseSettings) -> dict[str, nn.Parameter]:
        """Return what a client's local run trains, by name; `model` comes from `wrap`."""
        return {}

    def staying(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return the trained parameters whose changes stay on the client, by name."""
        return {}

    def travelling(self, model: nn.Module, settings: BaseSettings) -> dict[str, nn.Parameter]:
        """Return the trained parameters that are sent and averaged, by name."""
        staying = {id(parameter) for parameter in self.staying(model).values()}
        trained = self.trained(model, settings)
        return {name: p for name, p in trained.items() if id(p) not in staying}

    def merged(self, model: nn.Module) -> nn.Module:
        """Return the plain model at the end of the training; `model` is used up."""
        return model

    def own_part(self, finished: Callable[[], nn.Module], work: LocalWork) -> Part:
        """Return what a client adds to the finished base for itself, if it has kept nothing yet.

        Args:
            finished: Gives the merged model in fp32, wrapped; changed in place.
            work: The client.
        """
        return {}

    def replacements(
        self, finished: Callable[[], nn.Module], part: Part
    ) -> Iterator[tuple[str, Replacement]]:
        """Yield the values of a client with this part, by parameter name of the base."""
        return iter(())

    def carried(self, weights: AdapterWeights, part: Part) -> AdapterWeights:
        """Return an adapter on the client's own base as one on the common base."""
        return weights


def rate(settings: BaseSettings, round_: int) -> float:
    """Return the learning rate of a round, counted from 1."""
    if settings.schedule == "constant":
        return settings.lr
    return settings.lr * (1 + math.cos(math.pi * (round_ - 1) / settings.rounds)) / 2


@torch.no_grad()
def copy_parameters(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    """Copy values into the parameters of the same names."""
    for name, parameter in parameters.items():
        parameter.copy_(values[name])
