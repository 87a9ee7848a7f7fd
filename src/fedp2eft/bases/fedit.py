"""FedIT: FedAvg of LoRA, A and B each averaged (paper section 5, base models)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from peft import LoraConfig, PeftModel
from torch import nn

from fedp2eft.adapters.btlora import common_A
from fedp2eft.adapters.gates import AdaptedLayer, adapted_layers, add_adapter
from fedp2eft.bases.base import BaseTraining
from fedp2eft.seeding import derive_seed
from fedp2eft.settings.experiment import BaseSettings, Settings

ADAPTER = "default"


class FedIT(BaseTraining):
    """Plain PEFT LoRA on every linear layer, or those named, merged into the model at the end.

    A classification head is adapted as any linear layer, its own weights stay as they are; a causal
    LM's output head is left out. All clients start from the same A, and from B = 0.
    """

    def wrap(self, model: nn.Module, settings: Settings) -> nn.Module:
        """Return the model with LoRA on it."""
        s = settings.base
        config = LoraConfig(
            r=s.lora_rank,
            lora_alpha=s.lora_alpha,
            lora_dropout=s.lora_dropout,
            target_modules=s.target_modules or "all-linear",
        )
        refusal = f"LoRA cannot be put on {s.target_modules!r} (base.target_modules)"
        wrapped: nn.Module = add_adapter(model, config, ADAPTER, refusal)
        start_afresh(lora_layers(wrapped), derive_seed("base LoRA", settings.adapter.seed))
        return wrapped

    def trained(self, model: nn.Module, settings: BaseSettings) -> dict[str, nn.Parameter]:
        """Return A and B of every layer."""
        found: dict[str, nn.Parameter] = {}
        for layer in lora_layers(model):
            found |= {f"{layer.name}.lora_A": layer.A, f"{layer.name}.lora_B": layer.B}
        return found

    def merged(self, model: nn.Module) -> nn.Module:
        """Return the model with W + s·B·A in place of W, in its own dtype (fp32)."""
        assert isinstance(model, PeftModel)
        plain: nn.Module = model.merge_and_unload()
        return plain


def lora_layers(model: nn.Module) -> list[AdaptedLayer]:
    """Return the layers with the base's LoRA, in module order."""
    return list(adapted_layers(model, ADAPTER))


@torch.no_grad()
def start_afresh(layers: Iterable[AdaptedLayer], seed: int) -> None:
    """Set A Kaiming-uniform (a = √5) from the seed and the layer's name alone, and B to 0."""
    for layer in layers:
        layer.A.copy_(common_A(layer.name, layer.A, seed))
        layer.B.zero_()
