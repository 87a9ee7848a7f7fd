"""Standard FL: FedAvg of full fine-tuning, before any adapter (paper section 5, base models)."""

from __future__ import annotations

from torch import nn

from fedp2eft.bases.base import Base
from fedp2eft.settings.experiment import BaseSettings


class StandardFL(Base):
    """All weights are trained, travel and are averaged."""

    def trained(self, model: nn.Module, settings: BaseSettings) -> dict[str, nn.Parameter]:
        """All parameters.

        Without `train_embeddings` the input embeddings stay as they are (an output layer tied to
        them does too).
        """
        embeddings: set[int] = set()
        if not settings.train_embeddings:
            embeddings = {id(p) for p in model.get_input_embeddings().parameters()}  # type: ignore[operator]
        return {name: p for name, p in model.named_parameters() if id(p) not in embeddings}
