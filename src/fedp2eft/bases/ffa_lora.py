"""FFA-LoRA (Sun et al., ICLR 2024): A stays at its common start, only B is trained and averaged.

The mean of B·A over clients is then exactly (mean of B)·A, which it is not where both are averaged.
"""

from __future__ import annotations

from torch import nn

from fedp2eft.bases.fedit import FedIT, lora_layers
from fedp2eft.settings.experiment import BaseSettings


class FFALora(FedIT):
    """FedIT at half the message size."""

    def trained(self, model: nn.Module, settings: BaseSettings) -> dict[str, nn.Parameter]:
        """Return B of every layer."""
        return {f"{layer.name}.lora_B": layer.B for layer in lora_layers(model)}
