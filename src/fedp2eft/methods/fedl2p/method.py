"""FedL2P on LoRA (paper section 5, baselines): what a client does in a round, and at the end.

One outer step of a client: uniform LoRA of rank `fedl2p.rank` is fine-tuned on 80 % of the client's
training rows by AdamW at the learning rates that the meta-net gives, one for every matrix; the loss
on the held-out 20 % is then differentiated with respect to the meta-net's parameters η.

AdamW's last step moved matrix m by −rate_m(η)·u_m, u being its normalized momentum. It is linear in
the rates, so ∂Φ/∂η of the implicit gradient (`hyper_gradient`) is exactly that of AdamW. For ∂Φ/∂θ
a plain gradient step of size `fedl2p.hyper_lr` stands in: AdamW's own Jacobian divides by √v̂, which
has no bound where gradients vanish, and a series cut off after three terms would be made of that.
H is that of one mini-batch, in the base model's dtype. FedL2P's public code takes the same u and
the same series, but multiplies by −H once more (it differentiates the training gradient at a θ that
depends on η); where H is positive that points the other way than a finite difference does, so it is
not repeated here.

The number of the meta-net's outputs does not depend on the rank: one meta-net, trained at one rank,
serves every budget. At the end it is used on all training rows of a client.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedp2eft.client.descent import adamw, descend, local_order, padded_loss, rate_groups
from fedp2eft.client.phase import VALIDATION_LOSS, Trained, Turn, Workspace
from fedp2eft.client.side import ClientSide, Outcome
from fedp2eft.errors import DivergedError
from fedp2eft.methods.fedl2p.hyper_gradient import hyper_gradient
from fedp2eft.methods.fedl2p.meta_net import MetaNet
from fedp2eft.methods.fedl2p.settings import FedL2PSettings
from fedp2eft.methods.lora import uniform
from fedp2eft.seeding import derive_seed
from fedp2eft.tasks.encoded import Encoded


def first(workspace: Workspace) -> dict[str, Tensor]:
    """Return the meta-net before its first round."""
    s, matrices = workspace.settings.section(FedL2PSettings), 2 * len(workspace.bt.names)
    return MetaNet(workspace.psg_config.n_features, s.hidden, matrices, s.init_lr, s.seed).eta()


def train_turn(turn: Turn) -> Trained:
    """Run one client's part of a federated round."""
    net = MetaNet.of(turn.parameters)
    settings = turn.workspace.settings.section(FedL2PSettings)
    metrics = train_round(turn.side(), net, settings, turn.seed)
    return Trained(net.eta(), metrics)


def fedl2p(client: ClientSide, rank: int) -> Outcome:
    """Fit uniform LoRA at the budget, at the learning rates that the meta-net predicts."""
    with torch.no_grad():
        rates = MetaNet.of(client.shared)(client.features())
    return client.fit(*uniform(client.bt, rank), rates=rates)


def train_round(
    client: ClientSide, net: MetaNet, settings: FedL2PSettings, seed: int
) -> dict[str, float]:
    """Run one client's part of a round: inner fine-tuning and one outer step, three times.

    Epochs, mini-batches, clip and dropout of the inner run are those of personalization.

    Args:
        client: Its training rows are divided into those of the inner and of the outer loss, in the
            same way in every round; a single row is both.
        net: Holds the server's parameters; changed in place.
        settings: FedL2P.
        seed: Seed of mini-batch order and dropout in this round.

    Returns:
        Training loss, mean over all inner steps; and the loss on the held-out rows after an inner
        run, mean over the outer steps.

    Raises:
        DivergedError: A loss or the hyper-gradient is not finite.
    """
    bt, task, local = client.bt, client.task, client.settings
    # Held-out rows drive the meta-net; too few rows to hold any out: the training rows.
    xi, trial = client.features(), client.trial(settings.validation)
    train, held = trial.train, trial.test if len(trial.test) else trial.train
    lam, keep = (value.to(bt.lam.device) for value in uniform(bt, settings.rank))
    hyper = list(net.parameters())
    outer_optimizer = torch.optim.Adam(
        [
            {"params": net.layers.parameters(), "lr": settings.meta_lr},
            {"params": [net.lr], "lr": settings.lr_lr},
        ]
    )
    losses: list[float] = []
    held_losses: list[float] = []
    for number in range(settings.steps):
        part = replace(trial, seed=derive_seed(seed, number)).part(number, settings.steps)
        order = part.order(local)
        # Inner: train a fresh LoRA at the rates that the meta-net predicts.
        rates = net(xi)
        with bt.trimmed(lam, keep) as adapter:
            weights = adapter.parameters()
            optimizer = adamw(rate_groups(weights, rates))
            losses += descend(
                bt.model,
                padded_loss(task, bt.model, train),
                order,
                optimizer,
                weights,
                local,
                seed=part.seed,
                on_step=part.each_of(len(order)),
            )
            # Outer: how the held-out loss changes with the weights, and the weights with the rates.
            held_loss, outer = _mean_gradient(client, held, weights)
            held_losses.append(held_loss)
            [rows, *_] = local_order(len(train), 1, local.batch_size, derive_seed(part.seed, "H"))
            with sdpa_kernel(SDPBackend.MATH):  # the fused kinds have no second derivative
                inner_loss = padded_loss(task, bt.model, train)(rows)
            moved = [
                -rate.to(u.device) * u
                for rate, u in zip(rates.flatten(), last_direction(optimizer), strict=True)
            ]
            gradients = hyper_gradient(
                outer, inner_loss, weights, hyper, lr=settings.hyper_lr, terms=settings.terms,
                step=moved,
            )  # fmt: skip
        # One Adam step of the meta-net and its learning rates.
        for parameter, gradient in zip(hyper, gradients, strict=True):
            if not bool(torch.isfinite(gradient).all()):
                raise DivergedError(
                    f"FedL2P's hyper-gradient is not finite (held-out loss {held_loss:.4g}): lower "
                    "fedl2p.init_lr, or check the text and the base model."
                )
            parameter.grad = gradient
        outer_optimizer.step()
    loss = sum(losses) / max(1, len(losses))
    return {"loss": loss, VALIDATION_LOSS: sum(held_losses) / len(held_losses)}


@torch.no_grad()
def last_direction(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return u per parameter in AdamW's last step, which moved it by −lr·u; zeros before a step."""
    found = []
    for group in optimizer.param_groups:
        (b1, b2), eps = group["betas"], group["eps"]
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if not state:
                found.append(torch.zeros_like(parameter))
                continue
            steps = state["step"].item()
            scale = (state["exp_avg_sq"] / (1 - b2**steps)).sqrt_().add_(eps)
            found.append(state["exp_avg"] / (1 - b1**steps) / scale)
    return found


def _mean_gradient(
    client: ClientSide, data: Encoded, weights: Sequence[Tensor]
) -> tuple[float, list[Tensor]]:
    """Return mean loss over all rows, and its gradient."""
    task, model = client.task, client.bt.model
    loss_of = padded_loss(task, model, data)
    total, gradient = 0.0, [torch.zeros_like(weight) for weight in weights]
    for rows in data.by_length(client.settings.batch_size):
        loss = loss_of(rows) * (len(rows) / len(data))
        parts = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
        gradient = [g + part for g, part in zip(gradient, parts, strict=True)]
        total += loss.item()
    return total, gradient
