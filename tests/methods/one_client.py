"""One client of the tiny model, with a PSG whose λ̂ differs from rank to rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedp2eft.adapters.btlora import BTLora
from fedp2eft.federation.server.evaluation import summed
from fedp2eft.generator import PSG
from fedp2eft.methods import METHODS, ClientSide
from fedp2eft.settings.experiment import AdapterSettings, LocalSettings
from tiny import TASK, tiny, tiny_psg, tiny_rows

LOCAL = LocalSettings(batch_size=6, personalize_lr=1e-2, max_length=16, lambda_lr=0.1, lr=1e-2)


def adapted(kind: str = "bert", r_max: int = 4, dropout: float = 0.0) -> BTLora:
    return BTLora(tiny(kind, dropout).eval(), AdapterSettings(r_max=r_max))


def trained_psg(bt: BTLora, seed: int = 3, **facts: Any) -> PSG:
    """A PSG that answers ξ with λ̂ between about 0.3 and 3, another for every ξ."""
    psg = tiny_psg(bt, **facts)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in psg.named_parameters():
            value.copy_(0.1 * torch.randn(value.shape, generator=generator))
            if name == "last_layer.bias":
                value.add_(1.5)
    return psg


def features(psg: PSG, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(psg.config.n_features, generator=generator)


def one_client(number: int = 0, bt: BTLora | None = None, **changes: Any) -> ClientSide:
    """Client `number`: rows, ξ and seed of its own; `changes` are fields of `ClientSide`."""
    bt = bt or adapted()
    psg = changes.pop("psg", None) or trained_psg(bt)
    facts = {
        "task": TASK,
        "train": tiny_rows([4 + i % 9 for i in range(24)], seed=10 + number),
        "test": tiny_rows([5 + i % 7 for i in range(9)], seed=50 + number),
        "features": lambda: features(psg, number),
        "settings": LOCAL,
        "seed": 100 + number,
    }
    return ClientSide(bt=bt, psg=psg, **facts | changes)


def asked(method: str, clients: Sequence[ClientSide], rank: int) -> dict[str, Tensor]:
    """What the clients are told after all surveys of a method."""
    told: dict[str, Tensor] = {}
    for survey in METHODS[method].surveys:
        answers = [survey.ask(replace(c, prepared=told), rank) for c in clients]
        told |= survey.combine(summed(answers), len(answers))
    return told


class Chosen:
    """Stands in for fine-tuning: remembers λ and kept ranks that a method asked for."""

    def __init__(self, monkeypatch: Any) -> None:
        self.calls: list[tuple[Tensor, Tensor]] = []
        monkeypatch.setattr(ClientSide, "fit", self.fit)

    def fit(self, lam: Tensor, keep: Tensor, *_: Any) -> None:
        self.calls.append((lam, keep))

    def of(self, client: ClientSide, method: str, rank: int) -> tuple[Tensor, Tensor]:
        METHODS[method].fit(client, rank)
        return self.calls.pop()
