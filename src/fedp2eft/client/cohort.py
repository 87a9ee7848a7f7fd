"""`train_round` of `fedp2eft.client.training` for several clients in one batch, C at once.

All clients share one frozen base, so their stage 1 can share its forward and backward passes. Each
client keeps its own A, B, λ, optimiser state, clip, N and losses: numbers are those of one client
at a time up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from types import SimpleNamespace

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.optim.adamw import adamw

from fedp2eft.adapters.btlora import BTLora
from fedp2eft.adapters.stacked import CohortLora
from fedp2eft.client.training import LossTerms, OnStep, Round, not_finite
from fedp2eft.errors import UserError
from fedp2eft.generator import PSG
from fedp2eft.models.loading import has_dropout
from fedp2eft.modes import in_mode
from fedp2eft.settings.experiment import GeneratorSettings, LocalSettings
from fedp2eft.settings.profiles import Profile
from fedp2eft.tasks.encoded import Encoded
from fedp2eft.tasks.task import Task

Rows = NDArray  # type: ignore[type-arg]


@dataclass(frozen=True)
class CohortClient:
    """One client of a cohort.

    Args:
        data: Its training rows.
        xi: ξ, log N included where the PSG wants it.
        order: Mini-batches of row numbers.
    """

    data: Encoded
    xi: Tensor
    order: Sequence[Rows]


def why_alone(bt: BTLora, settings: LocalSettings) -> str | None:
    """Why clients of this model must train one at a time; None where a cohort may."""
    if settings.dropout and has_dropout(bt.model):
        return "local.dropout is on, and every client draws its own dropout: set it to false"
    if getattr(bt.model, "is_activation_checkpointing", False):
        return "gradient checkpointing is on"
    base = [layer.module.get_base_layer() for layer in bt.layers]
    for name, module in zip(bt.names, base, strict=True):
        if type(module) is not nn.Linear:
            return f"layer {name} is a {type(module).__name__}, not an nn.Linear"
    if len({module.weight.dtype for module in base}) > 1:
        return "the adapted layers are of several dtypes"
    return None


def train_cohort(
    bt: BTLora,
    task: Task,
    clients: Sequence[CohortClient],
    psg: PSG,
    settings: LocalSettings,
    generator: GeneratorSettings,
    profile: Profile,
    *,
    on_step: OnStep | None = None,
) -> list[Round | UserError]:
    """`train_round` of every client, in one batch.

    Args:
        bt: The shared adapter; its base is used, it is reset, and `why_alone` must be None.
        task: Loss of a client's rows: a function of the model's logits.
        clients: The cohort.
        psg: Holds φ of the server; unchanged.
        settings: Stage 1.
        generator: Stage 2.
        profile: `paper` or `reference`.
        on_step: Called after every step with the mean of L over the clients that took it.

    Returns:
        In the order of `clients`, what `train_round` gives; or the error that it would raise.

    Raises:
        NotPerRowError: The model mixes the rows of a batch.
    """
    # Clients that end first stand last: at any step those still training are a prefix.
    ranked = sorted(range(len(clients)), key=lambda c: -len(clients[c].order))
    chosen = [clients[c] for c in ranked]
    with torch.no_grad():
        lam = torch.stack([psg(client.xi) for client in chosen])
    lora = CohortLora(bt, lam, clamp_forward=profile.clamp_forward)
    losses = cohort_stage1(lora, bt, task, chosen, settings, profile, on_step=on_step)
    target = bt.clamped(lora.lam) if profile.clamp_target else lora.lam
    xi = torch.stack([client.xi for client in chosen])
    psg_losses, phis = cohort_stage2(psg, xi.to(target.device), target, generator)
    found: list[Round | UserError] = [UserError()] * len(clients)
    for place, c in enumerate(ranked):
        mine = losses[place]
        if isinstance(mine, UserError):
            found[c] = mine
            continue
        lam = bt.rank_lambda(lora.lam[place]).cpu()
        found[c] = Round(
            phis[place], len(clients[c].data), psg_losses[place], mine[0], lam, mine[1]
        )
    return found


def cohort_stage1(
    lora: CohortLora,
    bt: BTLora,
    task: Task,
    clients: Sequence[CohortClient],
    settings: LocalSettings,
    profile: Profile,
    *,
    on_step: OnStep | None = None,
) -> list[tuple[list[float], LossTerms] | UserError]:
    """Minimise every client's own L over its (A, B, λ); λ^s is in `lora.lam` afterwards.

    Args:
        lora: The clients' adapters.
        bt: Whose base they sit on.
        task: Loss of a client's rows.
        clients: The longest `order` first.
        settings: Learning rates, weights of the penalties, clip, accumulation.
        profile: `paper` or `reference`.
        on_step: Called with the mean of L over the clients that took the step.

    Returns:
        For each client, L at every step and the terms of the last (zeros without a step); or an
        error where it was not finite.
    """
    assert all(len(a.order) >= len(b.order) for a, b in pairwise(clients))
    size = settings.accumulate
    groups = [
        [client.order[at : at + size] for at in range(0, len(client.order), size)]
        for client in clients
    ]
    examples = torch.tensor([float(len(client.data)) for client in clients], device=lora.lam.device)
    optimizer = _AdamW(lora.tensors(), settings.lr, settings.lambda_lr)
    lambda_gradient = torch.zeros_like(lora.lam)
    losses: list[list[float]] = [[] for _ in clients]
    terms = [LossTerms()] * len(clients)
    errors: dict[int, UserError] = {}
    with in_mode(bt.model, training=False), lora.active():
        for step in range(max((len(group) for group in groups), default=0)):
            now = [group[step] for group in groups if len(group) > step]
            leaves = lora.leaves(len(now))
            total, gradients = torch.zeros_like(lora.lam[: len(now), 0, 0]), None
            fits, priors = torch.zeros_like(total), []
            for at in range(max(map(len, now))):
                rows = [group[at] for group in now if len(group) > at]
                count = len(rows)
                data = [client.data for client in clients[:count]]
                fit = _losses(lora, leaves, bt, task, data, rows)
                prior = lora.penalty(leaves, examples[:count], settings.alpha_s, settings.alpha_p)
                priors.append(prior)
                share = torch.tensor([len(group) for group in now[:count]]).to(total.device)
                fit = settings.alpha_task * fit
                loss = (fit + prior.total) / share
                # A layer that the model does not use has no gradient, as it has none alone.
                part = torch.autograd.grad(loss.sum(), leaves, materialize_grads=True)
                total[:count] += loss.detach()
                fits[:count] += fit.detach() / share
                gradients = (
                    list(part)
                    if gradients is None
                    else [a.add_(b) for a, b in zip(gradients, part, strict=True)]
                )
            assert gradients is not None
            if not profile.zero_lambda_grad:
                lambda_gradient[: len(now)] += gradients[-1]
                gradients[-1] = lambda_gradient[: len(now)]
            clip_each(gradients[:-1], settings.max_grad_norm)
            optimizer.step(gradients)
            values = total.tolist()
            for client, value in enumerate(values):
                # A client whose numbers are lost computes on inside its own block, unheard.
                if not math.isfinite(value) and client not in errors:
                    errors[client] = not_finite(value, step + 1)
                losses[client].append(value)
            if ending := [c for c, group in enumerate(groups) if len(group) == step + 1]:
                # all clients of the step are in its first mini-batch, and the prior is one for all
                told = torch.stack([fits, *priors[0].terms()], dim=1).tolist()
                for client in ending:
                    terms[client] = LossTerms(*told[client])
            if on_step:
                on_step(sum(values) / len(values))
    return [errors.get(c, (losses[c], terms[c])) for c in range(len(clients))]


def _losses(
    lora: CohortLora,
    leaves: Sequence[Tensor],
    bt: BTLora,
    task: Task,
    data: Sequence[Encoded],
    rows: Sequence[Rows],
) -> Tensor:
    """Task loss of each client's rows, from one pass over the rows of all of them."""
    cpu = replace(task, device="cpu")
    parts = [cpu.batch(one, chosen) for one, chosen in zip(data, rows, strict=True)]
    height = max(len(part["input_ids"]) for part in parts)
    width = max(part["input_ids"].shape[1] for part in parts)
    whole = {
        key: torch.cat(
            [
                _grown(part[key], height, width, task.pad_id if key == "input_ids" else 0)
                for part in parts
            ]
        ).to(task.device)
        for key in parts[0]
    }
    lora.load(leaves, len(parts), height)
    inputs = {key: value for key, value in whole.items() if key != "labels"}
    logits = torch.split(bt.model(**inputs).logits.float(), height)
    blocks = {key: torch.split(value, height) for key, value in whole.items()}
    found = []
    for c, part in enumerate(parts):
        mine = {key: _like(blocks[key][c], value.shape) for key, value in part.items()}
        known = logits[c]
        # rows × classes, or rows × tokens × vocabulary
        size = part["input_ids"].shape[: known.dim() - 1]
        found.append(task.loss(_Told(_like(known, size)), mine))
    return torch.stack(found)


def _grown(values: Tensor, height: int, width: int, fill: int) -> Tensor:
    """A client's rows padded on the right, and its first row repeated until there are `height`.

    A row of padding alone would make NaN in some kinds of attention.
    """
    if values.dim() > 1:
        values = nn.functional.pad(values, (0, width - values.shape[1]), value=fill)
    missing = height - len(values)
    return torch.cat([values, values[:1].expand(missing, *values.shape[1:])])


def _like(values: Tensor, shape: Sequence[int]) -> Tensor:
    """The upper left part of a client's block: its own rows, and its own columns if it has any."""
    for dim, size in enumerate(shape):
        values = values if values.shape[dim] == size else values.narrow(dim, 0, size)
    return values


class _Told(nn.Module):
    """A model whose logits are known already: the task's own loss reads a client's share."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self._logits = logits

    def forward(self, **_inputs: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self._logits)


def clip_each(gradients: Sequence[Tensor], bound: float) -> None:
    """`clip_grad_norm_` of every client by itself, in place; clients come first in each tensor."""
    norms = torch.stack([torch.linalg.vector_norm(g.flatten(1), dim=1) for g in gradients])
    scale = (bound / (torch.linalg.vector_norm(norms, dim=0) + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(scale.view(-1, *[1] * (gradient.dim() - 1)))


class _AdamW:
    """`fedp2eft.client.training.adamw` for the clients that still train: a prefix of every tensor.

    They have all taken the same number of steps, so one count serves them.
    """

    def __init__(self, values: list[Tensor], lr: float, lambda_lr: float) -> None:
        self._values = values
        self._rates = [lr] * (len(values) - 1) + [lambda_lr]
        self._first = [torch.zeros_like(value) for value in values]
        self._second = [torch.zeros_like(value) for value in values]
        self._steps = [torch.zeros((), device=value.device) for value in values]

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor]) -> None:
        clients = len(gradients[0])
        for rate in dict.fromkeys(self._rates):
            these = [i for i, mine in enumerate(self._rates) if mine == rate]
            adamw(
                [self._values[i][:clients] for i in these],
                [gradients[i] for i in these],
                [self._first[i][:clients] for i in these],
                [self._second[i][:clients] for i in these],
                [],
                [self._steps[i] for i in these],
                fused=True,
                amsgrad=False, beta1=0.9, beta2=0.999, lr=rate, weight_decay=0.0, eps=1e-8,
                maximize=False,
            )  # fmt: skip


def cohort_stage2(
    psg: PSG, xi: Tensor, target: Tensor, settings: GeneratorSettings
) -> tuple[list[float], list[dict[str, Tensor]]]:
    """Stage 2 of every client from one φ: Adam on each client's own Σ|PSG(ξ; φ) − λ^s|.

    Args:
        psg: Holds φ of the server; unchanged.
        xi: ξ of the clients, C × features.
        target: λ^s, C × L × r_max (or C × L × 1).
        settings: Steps and learning rate.

    Returns:
        For each client the mean loss over the steps, and its φ.
    """
    net = _Predict(psg)
    phi = {
        name: value.detach().to(xi.device).expand(len(xi), *value.shape).clone().requires_grad_()
        for name, value in net.named_parameters()
    }
    predict = vmap(lambda mine, features: functional_call(net, mine, (features,)))
    optimizer = torch.optim.Adam(phi.values(), lr=settings.lr)
    total = torch.zeros(len(xi), device=xi.device)
    for _ in range(settings.steps):
        optimizer.zero_grad()
        loss = (predict(phi, xi) - target).abs().sum(dim=(1, 2))
        loss.sum().backward()
        optimizer.step()
        total += loss.detach()
    numbers = {name.removeprefix("psg."): value.detach().cpu() for name, value in phi.items()}
    return (total / max(1, settings.steps)).tolist(), [
        {name: value[c].clone() for name, value in numbers.items()} for c in range(len(xi))
    ]


class _Predict(nn.Module):
    """The PSG without its checks, which look at numbers and so cannot be mapped over clients."""

    def __init__(self, psg: PSG) -> None:
        super().__init__()
        self.psg = psg

    def forward(self, features: Tensor) -> Tensor:
        return self.psg.predict(features)
