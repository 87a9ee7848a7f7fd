"""The last block computed at the first position alone: the same logits, loss and gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, DistilBertConfig

from fedp2eft.adapters.btlora import BTLora
from fedp2eft.settings.experiment import AdapterSettings
from fedp2eft.tasks.first_position import only_first_position
from tiny import (
    CLASSES,
    ENCODERS,
    LONGEST,
    TASK,
    VOCABULARY,
    classifier,
    disturb,
    double_adapter,
    tiny,
    tiny_rows,
)  # fmt: skip

DATA = tiny_rows([5, LONGEST - 2, 3])
ROWS = np.arange(len(DATA))


@contextmanager
def positions_of(model: nn.Module) -> Iterator[list[int]]:
    """Positions that each block's last linear layer reads."""
    seen: list[int] = []
    for name, module in model.named_modules():
        if name.endswith(".output.dense") and ".attention." not in name:
            module.register_forward_pre_hook(lambda _m, args: seen.append(args[0].shape[1]))
    yield seen


@pytest.mark.parametrize("kind", ENCODERS)
def test_loss_and_every_gradient_stay_the_same(kind: str, monkeypatch) -> None:
    bt = BTLora(classifier(kind), AdapterSettings(r_max=4))
    bt.lam.data = bt.lam.data.double()
    bt.reset(0.5)
    disturb(bt)
    found = []
    with positions_of(bt.model.get_base_model()) as seen:
        for cut in (True, False):
            if not cut:
                monkeypatch.setattr("fedp2eft.tasks.first_position._READS_FIRST", ())
            loss = TASK.loss(bt.model, TASK.batch(DATA, ROWS))
            leaves = [*bt.A, *bt.B, bt.lam]
            found.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    assert seen == [LONGEST - 2, 1, LONGEST - 2, LONGEST - 2]
    for mine, whole in zip(*found, strict=True):
        torch.testing.assert_close(mine, whole, rtol=1e-9, atol=1e-12)


def test_scores_are_computed_at_the_first_position_alone() -> None:
    model = classifier("bert").eval()
    with positions_of(model) as seen:
        logits = TASK.logits(model, DATA, 8)
    assert seen == [LONGEST - 2, 1]
    whole = model(**{k: v for k, v in TASK.batch(DATA, ROWS).items() if k != "labels"}).logits
    torch.testing.assert_close(logits, whole.detach().float())


def test_afterwards_every_position_is_computed_again() -> None:
    bt = double_adapter()
    inputs = TASK.batch(DATA, ROWS)
    inputs.pop("labels")
    with positions_of(bt.model.get_base_model()) as seen:
        with only_first_position(bt.model):
            bt.model(**inputs)
        bt.model(**inputs)
    assert seen == [LONGEST - 2, 1, LONGEST - 2, LONGEST - 2]


def test_gradient_checkpointing_computes_every_position() -> None:
    model = tiny("bert", dropout=0.0)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    with positions_of(model) as seen:
        TASK.loss(model, TASK.batch(DATA, ROWS)).backward()
    assert set(seen) == {LONGEST - 2}


def test_another_kind_of_model_is_left_alone() -> None:
    config = DistilBertConfig(
        vocab_size=VOCABULARY, dim=16, n_layers=2, n_heads=2, hidden_dim=24, num_labels=CLASSES
    )
    model = AutoModelForSequenceClassification.from_config(config).eval()
    inputs = TASK.batch(DATA, ROWS)
    inputs.pop("labels")
    whole = model(**inputs).logits
    with only_first_position(model):
        torch.testing.assert_close(model(**inputs).logits, whole)
