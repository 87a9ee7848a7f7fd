"""What the tests of a base in memory share: settings, a model, a client's work."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedp2eft.bases import BASES, BaseTraining, LocalWork
from fedp2eft.bases.fedit import lora_layers
from fedp2eft.settings.experiment import AdapterSettings, BaseSettings, LocalSettings, Settings
from tiny import TASK, tiny, tiny_rows

ROWS_OF_CLIENT = [6, 9, 4, 12, 7, 5, 8]
IDS = torch.arange(1, 13).reshape(2, 6)


def settings(kind: str, **base: object) -> Settings:
    """Settings under which a few steps move something, without dropout."""
    options = {"lr": 1e-2, "batch_size": 4, "epochs": 1, "lora_rank": 4, "lora_alpha": 6.0}
    return Settings(
        base=BaseSettings(kind=kind, **options | base),  # type: ignore[arg-type]
        local=LocalSettings(dropout=False),
        adapter=AdapterSettings(r_max=16),
    )


def work(s: Settings, client: str = "c0", seed: int = 0) -> LocalWork:
    return LocalWork(client, TASK, tiny_rows(ROWS_OF_CLIENT, seed), s, torch.float32, 5)


def wrapped(s: Settings, model: str = "bert") -> tuple[BaseTraining, nn.Module]:
    base = BASES[s.base.kind]
    return base, base.wrap(tiny(model, dropout=0.0).eval(), s)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=IDS).logits.double()


def disturb(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in lora_layers(model):
            layer.B.add_(torch.randn(layer.B.shape, generator=generator) * 0.3)
