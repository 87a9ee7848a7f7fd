"""FedDPA-T (NeurIPS 2024): a global LoRA that is averaged, then a local one for each client.

The global LoRA is FedIT's and ends up in the common model. On top of that a client trains a LoRA on
its own rows, once, with the recipe of one round (constant learning rate); it never travels. All
personalization, and the client's part in the PSG's federation, starts from the model with both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from peft.utils.other import transpose
from torch import nn

from fedp2eft.adapters.weights import AdapterWeights, LayerWeights
from fedp2eft.bases.base import LocalWork
from fedp2eft.bases.fedit import FedIT, lora_layers, start_afresh
from fedp2eft.bases.parts import Part, Replacement
from fedp2eft.seeding import derive_seed


class FedDPAT(FedIT):
    """A client's part is A (r × d_in) and s·B (d_out × r) of every layer."""

    private = True

    def own_part(self, finished: Callable[[], nn.Module], work: LocalWork) -> Part:
        """Train the client's local LoRA; the same bits each time."""
        model, s = finished(), work.settings
        layers = lora_layers(model)
        start_afresh(layers, derive_seed("local LoRA", s.adapter.seed, work.client))
        work.fine_tune(model, self.trained(model, s.base).values(), s.base.lr)
        part = {}
        for layer in layers:
            scale = s.base.lora_alpha / s.base.lora_rank
            part[f"{layer.name}.lora_A"] = layer.A.detach().cpu().clone()
            part[f"{layer.name}.lora_B"] = layer.B.detach().cpu() * scale
        return part

    def replacements(
        self, finished: Callable[[], nn.Module], part: Part
    ) -> Iterator[tuple[str, Replacement]]:
        """Yield W + s·B·A of every layer in fp32, from the common model's own fp32 weights."""
        for layer in lora_layers(finished()):
            weight = layer.module.get_base_layer().weight.detach()
            A, B = (part[f"{layer.name}.lora_{x}"].to(weight.device) for x in "AB")
            delta = transpose(B @ A, layer.module.fan_in_fan_out)
            yield f"{layer.name}.weight", Replacement(weight + delta)

    def carried(self, weights: AdapterWeights, part: Part) -> AdapterWeights:
        """Return the local LoRA's ranks followed by the adapter's own, both scaled in B."""
        layers, left = [], dict(part)
        for layer in weights.folded().layers:
            A, B = (left.pop(f"{layer.name}.lora_{x}", None) for x in "AB")
            if A is not None and B is not None:
                ones = torch.ones(len(A) + layer.rank)
                A, B = torch.cat([A, layer.A]), torch.cat([B, layer.B], dim=1)
                layer = replace(layer, A=A, B=B, lam=ones)
            layers.append(layer)
        for name in [key.removesuffix(".lora_A") for key in left if key.endswith(".lora_A")]:
            if weights.head and name == weights.head.name:
                continue  # made from the client's own base
            A, B = left[f"{name}.lora_A"], left[f"{name}.lora_B"]
            layers.append(LayerWeights(name, A, B, torch.ones(len(A))))
        return replace(weights, layers=tuple(layers), scaling=1.0)
