"""`train_round` of `fedp2eft.client.training` for several clients in one batch, C at once.

All clients share one frozen base, so their stage 1 can share its forward and backward passes. Each
client keeps its own A, B, λ, optimizer state, clip, N and losses: results are those of one client
at a time up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from types import SimpleNamespace

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call, vmap

from fedp2eft.adapters.btlora import BTLora
from fedp2eft.adapters.stacked import StackedLora, clip_each
from fedp2eft.client.descent import not_finite, steps_of
from fedp2eft.client.training import LossTerms, Round, minimise, stage2
from fedp2eft.errors import UserError
from fedp2eft.generator import PSG
from fedp2eft.modes import has_dropout
from fedp2eft.settings.experiment import GeneratorSettings, LocalSettings
from fedp2eft.settings.profiles import Profile
from fedp2eft.tasks.encoded import Encoded
from fedp2eft.tasks.frozen_blocks import run
from fedp2eft.tasks.task import Task

Indices = NDArray  # type: ignore[type-arg]


@dataclass(frozen=True)
class CohortClient:
    """One client of a cohort.

    Args:
        data: Its training rows.
        xi: ξ, log N included where the PSG wants it.
        order: Mini-batches of row indices.
        task: Its own task, in place of the cohort's.
    """

    data: Encoded
    xi: Tensor
    order: Sequence[Indices]
    task: Task | None = None


def why_alone(bt: BTLora, settings: LocalSettings) -> str | None:
    """Return why clients of this model must train one at a time; None where a cohort may."""
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
    on_step: Callable[[list[float]], None] | None = None,
) -> list[Round | UserError]:
    """Run `train_round` of every client, in one batch.

    Args:
        bt: The shared adapter; its base is used, it is reset, and `why_alone` must be None.
        task: Loss of a client's rows: a function of the model's logits.
        clients: The cohort.
        psg: Holds φ of the server; unchanged.
        settings: Stage 1.
        generator: Stage 2.
        profile: `paper` or `reference`.
        on_step: Called after every step with L of every client.

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
    lora = StackedLora(bt, lam, clamp_forward=profile.clamp_forward)
    ended = cohort_stage1(lora, bt, task, chosen, settings, profile, on_step=on_step)
    lam = torch.stack([end.lam for end in ended])
    several = StackedPSG(psg, len(chosen), lam.device)
    xi = torch.stack([client.xi for client in chosen]).to(lam.device)
    target = bt.clamped(lam) if profile.clamp_target else lam
    psg_losses = stage2(several, xi, target, generator).tolist()
    found: dict[int, Round | UserError] = {}
    for c, end, psg_loss, phi in zip(ranked, ended, psg_losses, several.phis(), strict=True):
        lam, size = bt.rank_lambda(end.lam).cpu(), len(clients[c].data)
        found[c] = end.error or Round(phi, size, psg_loss, end.losses, lam, end.terms)
    return [found[c] for c in range(len(clients))]


@dataclass
class Ended:
    """One client after stage 1.

    Args:
        lam: λ^s, L × r_max (or L × 1).
        losses: L at every step.
        terms: What the last of them is the sum of; zeros without a step.
        error: The first loss that was not finite.
    """

    lam: Tensor
    losses: list[float] = field(default_factory=list)
    terms: LossTerms = field(default_factory=LossTerms)
    error: UserError | None = None


def cohort_stage1(
    lora: StackedLora,
    bt: BTLora,
    task: Task,
    clients: Sequence[CohortClient],
    settings: LocalSettings,
    profile: Profile,
    *,
    on_step: Callable[[list[float]], None] | None = None,
) -> list[Ended]:
    """Run `minimise` for several clients.

    A client that has ended keeps its place: its gradients are 0 from then on, and nothing reads
    what the optimizer still does to its parameters.

    Args:
        lora: The clients' adapters.
        bt: Whose base they sit on.
        task: Loss of a client's rows.
        clients: The longest `order` first.
        settings: As for one client.
        profile: `paper` or `reference`.
        on_step: Called with L of every client at a step.
    """
    assert all(len(a.order) >= len(b.order) for a, b in pairwise(clients))
    ready = [task.with_states(bt.model, client.data) for client in clients]
    if all(data.states is not None for data in ready):  # one pass cannot start at two blocks
        clients = [replace(c, data=data) for c, data in zip(clients, ready, strict=True)]
    ended = [Ended(lam) for lam in lora.lam.detach().clone()]
    steps = [steps_of(client.order, settings) for client in clients]
    longest = max((len(client.order) for client in clients), default=0)
    order = [[c.order[at] for c in clients if len(c.order) > at] for at in range(longest)]
    device = lora.lam.device
    examples = torch.tensor([float(len(client.data)) for client in clients], device=device)

    def loss_of(rows: Sequence[Indices]) -> Tensor:
        losses = _losses(lora, bt, task, clients[: len(rows)], rows)
        return nn.functional.pad(losses, (0, len(clients) - len(rows)))

    def sizes(group: Sequence[Sequence[Indices]]) -> Tensor:
        counts = [sum(len(rows) > c for rows in group) for c in range(len(clients))]
        return torch.tensor(counts, device=device).clamp(min=1)

    def check(values: list[float], step: int) -> None:
        # A client whose parameters are lost computes on inside its own block.
        for end, value, last in zip(ended, values, steps, strict=True):
            if step <= last and not math.isfinite(value) and end.error is None:
                end.error = not_finite(value, step)

    with lora.active():
        losses, remembered = minimise(
            lora, bt.model, loss_of, order, examples, set(steps), settings, profile,
            clip=clip_each, sizes=sizes, check=check, on_step=on_step,
        )  # fmt: skip
    for c, (end, last) in enumerate(zip(ended, steps, strict=True)):
        end.losses = [values[c] for values in losses[:last]]
        if last in remembered:
            lam, *terms = remembered[last]
            end.lam, end.terms = lam[c], LossTerms(*(term[c].item() for term in terms))
    return ended


def _losses(
    lora: StackedLora,
    bt: BTLora,
    task: Task,
    clients: Sequence[CohortClient],
    rows: Sequence[Indices],
) -> Tensor:
    """Return task loss of each client's rows, from one pass over the rows of all of them."""
    cpu = replace(task, device="cpu")
    parts = [cpu.batch(one.data, chosen) for one, chosen in zip(clients, rows, strict=True)]
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
    lora.load(len(parts), height)
    inputs = {key: value for key, value in whole.items() if key != "labels"}
    logits = torch.split(run(bt.model, inputs).logits.float(), height)
    blocks = {key: torch.split(value, height) for key, value in whole.items()}
    found = []
    for c, part in enumerate(parts):
        mine = {key: _like(blocks[key][c], value.shape) for key, value in part.items()}
        mine.pop("states", None)  # the logits are known already
        known = logits[c]
        # rows × classes, or rows × tokens × vocabulary
        size = part["input_ids"].shape[: known.dim() - 1]
        found.append((clients[c].task or task).loss(_KnownLogits(_like(known, size)), mine))
    return torch.stack(found)


def _grown(values: Tensor, height: int, width: int, fill: int) -> Tensor:
    """Return a client's rows, right-padded, its first row repeated up to `height` rows.

    A row of padding alone would make NaN in some kinds of attention.
    """
    if values.dim() > 1:
        sides = (0, 0) * (values.dim() - 2) + (0, width - values.shape[1])
        values = nn.functional.pad(values, sides, value=fill)
    missing = height - len(values)
    return torch.cat([values, values[:1].expand(missing, *values.shape[1:])])


def _like(values: Tensor, shape: Sequence[int]) -> Tensor:
    """Return a client's block in the upper left: its own rows, and its own columns if any."""
    for dim, size in enumerate(shape):
        values = values if values.shape[dim] == size else values.narrow(dim, 0, size)
    return values


class _KnownLogits(nn.Module):
    """A model whose logits are known already: the task's own loss reads a client's share."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self._logits = logits

    def forward(self, **_inputs: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self._logits)


class StackedPSG(nn.Module):
    """Several clients' φ, each starting from a PSG's, in one tensor per parameter.

    Args:
        psg: Unchanged.
        clients: C.
        device: Where they are trained.
    """

    def __init__(self, psg: PSG, clients: int, device: torch.device) -> None:
        super().__init__()
        self._psg = [psg]  # in a list: its own parameters are not trained
        self._names = list(psg.state_dict())
        self.phi = nn.ParameterList(
            value.to(device).expand(clients, *value.shape).clone()
            for value in psg.state_dict().values()
        )

    def forward(self, xi: Tensor) -> Tensor:
        """Return λ̂ of every client (C × L × r_max) from its ξ (C × features)."""
        predict = vmap(lambda phi, features: functional_call(self._psg[0], phi, (features, False)))
        found: Tensor = predict(dict(zip(self._names, self.phi, strict=True)), xi)
        return found

    def phis(self) -> list[dict[str, Tensor]]:
        """Return φ of every client, as `PSG.phi`."""
        values = [value.detach().cpu().clone() for value in self.phi]
        return [
            {name: value[c].clone() for name, value in zip(self._names, values, strict=True)}
            for c in range(len(values[0]))
        ]
