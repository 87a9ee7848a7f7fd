"""Standard FL: FedAvg of full fine-tuning, before any adapter (paper section 5, base models)."""

from __future__ import annotations

import re

from torch import nn

from fedp2eft.bases.base import BaseTraining
from fedp2eft.errors import UserError
from fedp2eft.settings.experiment import BaseSettings


class StandardFL(BaseTraining):
    """All weights are trained, travel and are averaged."""

    def trained(self, model: nn.Module, settings: BaseSettings) -> dict[str, nn.Parameter]:
        """Return all parameters, or those of `target_modules`.

        Without `train_embeddings` the input embeddings stay as they are (an output layer tied to
        them does too).

        Raises:
            UserError: `target_modules` names nothing of the model.
        """
        embeddings: set[int] = set()
        if not settings.train_embeddings:
            embeddings = {id(p) for p in model.get_input_embeddings().parameters()}  # type: ignore[operator]
        targets = settings.target_modules
        found = {
            name: p
            for name, p in model.named_parameters()
            if id(p) not in embeddings and (targets is None or _is_part(name, targets))
        }
        if not found:
            raise UserError(f"base.target_modules is {targets!r}: the model has no such module.")
        return found


def _is_part(name: str, targets: str | list[str]) -> bool:
    """Return whether a parameter belongs to a module that PEFT would say the targets name."""
    parts = name.split(".")
    modules = [".".join(parts[:end]) for end in range(1, len(parts))]
    if isinstance(targets, str):
        return any(re.fullmatch(targets, module) for module in modules)
    return any(module == t or module.endswith(f".{t}") for module in modules for t in targets)
