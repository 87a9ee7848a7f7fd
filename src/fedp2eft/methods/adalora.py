"""AdaLoRA (Zhang et al., ICLR 2023): PEFT's own, as the paper's baseline (section 5).

    W' = W + s · P diag(E) Q        P: d_out × r0,  E ∈ R^r0,  Q: r0 × d_in

Every layer starts with r0 = max(⌊1.5·r⌋, r + 1) ranks (2 at r = 1: PEFT cannot drop none). Of the T
optimizer steps the first ⌊0.1·T⌋ drop nothing; then, at every step up to T − ⌊0.3·T⌋, ranks of the
least importance (gradient × weight, smoothed) get E = 0, down to r·L over the whole model; the rest
trains what is kept. PEFT ranks at one step what it measured before, so T must be 2 or more.

PEFT multiplies by lora_alpha / (r0 + 1e-5), with r0 whatever a layer keeps: lora_alpha = s·r0
leaves the scale at s throughout.

A budget in parameters (`evaluation.budget`) falls from r0 to r on the same schedule, and ranks are
kept in the order of their importance until the parameters are spent.

Minimised: task loss + 0.1 · mean over all P and Q of ‖PᵀP − I‖ and ‖QQᵀ − I‖ (Frobenius norms).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import AdaLoraConfig, PeftModel
from peft.tuners.adalora import RankAllocator
from torch import Tensor, nn

from fedp2eft.adapters.btlora import BTLora
from fedp2eft.adapters.budget import within
from fedp2eft.adapters.gates import adapted_layers, add_adapter
from fedp2eft.adapters.weights import AdapterWeights, LayerWeights
from fedp2eft.client.descent import adamw, descend, rows_loss
from fedp2eft.client.side import ClientSide, Outcome
from fedp2eft.errors import DivergedError, UserError
from fedp2eft.methods.settings import AdaLoraSettings
from fedp2eft.seeding import derive_seed

NAME = "adalora"


@dataclass(frozen=True)
class Schedule:
    """Ranks and steps of one run.

    Args:
        init_r: Ranks of a layer at the start, r0.
        target_r: Mean ranks of a layer at the end, r.
        steps: Optimizer steps, T.
        tinit: Steps before the first rank is dropped.
        tfinal: Steps after the last one is.
    """

    init_r: int
    target_r: int
    steps: int
    tinit: int
    tfinal: int

    @classmethod
    def of(cls, rank: int, steps: int, settings: AdaLoraSettings) -> Schedule:
        """Return shares of the steps, rounded down; of two or more steps the second drops ranks.

        Raises:
            UserError: Fewer than two steps.
        """
        if steps < 2:
            raise UserError(
                f"AdaLoRA needs 2 optimizer steps or more to drop ranks, and a client has {steps}: "
                "raise local.personalize_epochs or lower local.batch_size."
            )
        tfinal = min(_share(settings.tfinal, steps), steps - 2)
        tinit = min(_share(settings.tinit, steps), steps - tfinal - 1)
        init_r = max(_share(settings.init_multiple, rank), rank + 1)
        return cls(init_r, rank, steps, tinit, tfinal)


def adalora(client: ClientSide, rank: int) -> Outcome:
    """Fine-tune P, E and Q while ranks are dropped to r·L, and score the result."""
    s, settings = client.own, client.settings
    order = client.order(settings)
    report = client.each_of(len(order))
    schedule = Schedule.of(rank, math.ceil(len(order) / settings.accumulate), s)
    with client.bt.bare() as base:
        model = wrap(base, client.bt, schedule, s.orth)
        if client.costs is not None:
            model.base_model.rankallocator = ParameterAllocator(model, client.costs)
        weights = [p for p in model.parameters() if p.requires_grad]
        step = 0
        loss_of, parts_of = rows_loss(client.task, model, client.train)

        def allocate(loss: float) -> None:
            nonlocal step
            step += 1
            for weight in weights:  # an expert that no token was sent to
                if weight.grad is None:
                    weight.grad = torch.zeros_like(weight)
            model.base_model.update_and_allocate(step)
            report(loss)

        optimizer = adamw([{"params": weights, "lr": s.lr}])
        descend(
            model, loss_of, order, optimizer, weights, settings,
            seed=client.seed, on_step=allocate, parts_of=parts_of,
            prior=lambda: s.orth * orthogonality(model),
        )  # fmt: skip
        fitted = adapter_weights(model, client.bt)
        if not fitted.is_finite():
            raise DivergedError("The AdaLoRA adapter holds NaN: lower adalora.lr.")
        return Outcome(client.score(model), fitted)


def wrap(base: nn.Module, bt: BTLora, schedule: Schedule, orth: float) -> PeftModel:
    """Return PEFT's AdaLoRA on the layers that `bt` adapts; P and Q start alike for all clients.

    Raises:
        UserError: PEFT has no AdaLoRA for a kind of layer.
    """
    config = AdaLoraConfig(
        init_r=schedule.init_r,
        target_r=schedule.target_r,
        lora_alpha=bt.settings.scaling * schedule.init_r,
        tinit=schedule.tinit,
        tfinal=schedule.tfinal,
        deltaT=1,
        total_step=schedule.steps,
        orth_reg_weight=orth,
        target_modules="|".join(map(re.escape, bt.names)),
    )
    seed = derive_seed("adalora", bt.settings.seed)
    return add_adapter(base, config, NAME, "AdaLoRA cannot adapt this model", seed)


class ParameterAllocator(RankAllocator):  # type: ignore[misc]
    """PEFT's allocator of ranks, with a budget in parameters.

    Args:
        model: As `wrap` gives it.
        costs: Parameters of a rank of each adapted layer, in module order.
    """

    def __init__(self, model: PeftModel, costs: Sequence[int]) -> None:
        super().__init__(model.base_model.model, model.peft_config[NAME], NAME)
        self.costs = costs

    @torch.no_grad()
    def mask_to_budget(self, model: nn.Module, budget: int) -> dict[str, list[bool]]:
        """Set E to 0 outside the budget; returns the kept ranks by name of E.

        Args:
            model: The model with the adapter.
            budget: Ranks of all layers together; their mean number stands for the parameters of as
                many ranks on every layer.
        """
        values = dict(model.named_parameters())
        names = [name for name in values if f"lora_E.{NAME}" in name]
        scores = torch.stack([self._importance(name) for name in names])
        parameters = budget * sum(self.costs) // len(names)
        keep = within(scores, parameters, self.costs)
        for name, kept in zip(names, keep, strict=True):
            values[name].masked_fill_(~kept.unsqueeze(1), 0.0)
        return {name: kept.tolist() for name, kept in zip(names, keep, strict=True)}

    def _importance(self, name: str) -> Tensor:
        """Importance of each rank of a layer, as PEFT has it: that of E and the mean of P and Q."""
        A, B = (self._element_score(name.replace("lora_E", f"lora_{side}")) for side in "AB")
        sides = torch.stack([A.mean(dim=1), B.mean(dim=0)], dim=1)
        found: Tensor = self._combine_ipt(self._element_score(name), sides)
        return found


def orthogonality(model: nn.Module) -> Tensor:
    """Return the mean over all P and Q of ‖PᵀP − I‖ and ‖QQᵀ − I‖ (Frobenius norms).

    PEFT's AdaLoraModel.forward adds the same to a loss that the model itself computes. Here the
    task computes the loss, and a PeftModel without task type goes past that forward anyway.
    """
    modules = [layer.module for layer in adapted_layers(model, NAME)]
    sides = [m.lora_A[NAME] for m in modules] + [m.lora_B[NAME].T for m in modules]
    grams = torch.stack([side @ side.T for side in sides])
    norms: Tensor = torch.linalg.matrix_norm(grams - torch.eye(len(grams[0])).to(grams))
    return norms.mean()


def adapter_weights(model: PeftModel, bt: BTLora) -> AdapterWeights:
    """Return the ranks with E ≠ 0 as A = Q, B = P, λ = E: the same function of the input.

    Raises:
        UserError: No rank was ever dropped.
    """
    if model.peft_config[NAME].rank_pattern is None:
        raise UserError("AdaLoRA dropped no ranks: update_and_allocate was never called.")
    modules = {layer.name: layer.module for layer in adapted_layers(model, NAME)}
    layers, scaling = [], bt.settings.scaling
    for layer in bt.layers:
        module = modules[layer.name]
        E, A, B = (getattr(module, f"lora_{side}")[NAME].detach().cpu().clone() for side in "EAB")
        kept = E[:, 0] != 0
        layers.append(LayerWeights(layer.name, A[kept], B[:, kept], E[kept, 0]))
        scaling = float(module.scaling[NAME] / (module.ranknum[NAME] + 1e-5))
    return AdapterWeights(tuple(layers), scaling)


def _share(share: float, whole: int) -> int:
    """Return a share of a whole number, rounded down; 0.3 of 10 is 3 in spite of float rounding."""
    return math.floor(round(share * whole, 9))
