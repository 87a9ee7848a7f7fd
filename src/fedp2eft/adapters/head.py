"""A client's label prior inside its adapter, so that plain PEFT gives the same logits.

PEFT has no place for values added to logits, but `modules_to_save` replaces a module. The head is
saved whole: W + s·B·diag(λ)·A and its bias, both divided by the temperature, and the offset in the
bias. C × d parameters, 7 × 384 say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from fedp2eft.adapters.btlora import BTLora
from fedp2eft.adapters.weights import AdapterWeights, Head
from fedp2eft.errors import UserError


def head_of(linears: Sequence[tuple[str, nn.Module]], classes: int) -> tuple[str, nn.Linear] | None:
    """Return name and module of the head: the last linear layer of that many outputs with a bias.

    None if there is no such layer, as in classifiers made of causal LMs, whose head has no bias.
    """
    for name, module in reversed(linears):
        if isinstance(module, nn.Linear) and module.out_features == classes:
            floats = module.weight.is_floating_point() and module.bias is not None
            return (name, module) if floats else None
    return None


def check_head(bt: BTLora, classes: int) -> tuple[str, nn.Linear]:
    """Return `head_of`, or raise `UserError` if an adapter cannot carry an offset."""
    found = head_of(bt.linears, classes)
    if found is None:
        raise UserError(
            "This model's classification head has no bias, so no adapter can carry a label prior: "
            "set local.logit_adjustment to none, or choose an encoder."
        )
    return found


def with_head(weights: AdapterWeights, bt: BTLora) -> AdapterWeights:
    """Return the adapter with its offset and the head's low-rank part in a head of its own.

    Raises:
        UserError: The head cannot have an offset.
    """
    if weights.offset is None:
        return weights
    name, module = check_head(bt, weights.offset.numel())
    weight, bias = (value.detach().float().cpu() for value in (module.weight, module.bias))
    for layer in weights.folded().layers:
        if layer.name == name:
            weight = weight + layer.B @ layer.A
    layers = tuple(layer for layer in weights.layers if layer.name != name)
    t, offset = weights.temperature, weights.offset.float().cpu()
    head = Head(name, weight / t, bias / t + offset)
    return replace(weights, layers=layers, offset=None, temperature=1.0, head=head)


def read_head(names: Sequence[str] | None, tensors: dict[str, Any], prefix: str) -> Head | None:
    """Return the head that a saved adapter brings, None if it brings none.

    Raises:
        KeyError: A tensor of it is missing.
    """
    if not names:
        return None
    [name] = names
    parts: list[Tensor] = [tensors[f"{prefix}{name}.{part}"] for part in ("weight", "bias")]
    return Head(name, *parts)
