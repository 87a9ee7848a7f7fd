"""Whole local runs on states that are kept below the adapters: the numbers of whole passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedp2eft.adapters.btlora import BTLora
from fedp2eft.bases import BASES, LocalWork
from fedp2eft.bases.parts import Overlay, Replacement
from fedp2eft.client.cohort import CohortClient, train_cohort
from fedp2eft.client.descent import local_order
from fedp2eft.client.training import personalize, train_round
from fedp2eft.settings.experiment import (
    AdapterSettings,
    BaseSettings,
    GeneratorSettings,
    LocalSettings,
    Settings,
)
from fedp2eft.settings.profiles import PAPER
from fedp2eft.tasks.classification import Classification
from tiny import TASK, random_lambda, tiny, tiny_psg, tiny_rows

LOCAL = LocalSettings(dropout=False, batch_size=3, lr=1e-3, lambda_lr=5e-2, personalize_lr=1e-2)
GENERATOR = GeneratorSettings(init_lambda=0.5, steps=3, lr=1e-2)
KEEPS = replace(TASK, states_mib=1)
CLIENTS = [tiny_rows(lengths, seed) for seed, lengths in enumerate([[5, 3, 7, 4, 6], [9, 2, 4]])]


def upper(model: nn.Module | None = None) -> BTLora:
    """An adapter on the second of two blocks."""
    base = (model or tiny("bert", dropout=0.0)).eval()
    return BTLora(
        base, AdapterSettings(r_max=3, target_modules=r".*layer\.1\..*dense|.*pooler\.dense")
    )


def first_block_passes(model: nn.Module) -> list[tuple[int, ...]]:
    """Shapes of what enters the first block, as it happens."""
    seen: list[tuple[int, ...]] = []
    block: Any = model.bert.encoder.layer[0]  # type: ignore[union-attr]
    block.register_forward_pre_hook(lambda _m, args: seen.append(tuple(args[0].shape)))
    return seen


def each_way(action: Callable[[Classification], list[Tensor]]) -> None:
    """Assert that a task that keeps states gives the numbers of one that does not."""
    for kept, whole in zip(action(KEEPS), action(TASK), strict=True):
        torch.testing.assert_close(kept, whole, rtol=1e-4, atol=1e-6)


def test_a_round_and_a_personalization() -> None:
    bt, data = upper(), CLIENTS[0]
    seen = first_block_passes(bt.model.get_base_model())
    xi = torch.randn(2 * len(bt.linears), generator=torch.Generator().manual_seed(0))

    def both(task: Classification) -> list[Tensor]:
        psg = tiny_psg(bt, GENERATOR)
        order = list(local_order(len(data), 2, 3, 0))
        done = train_round(bt, task, data, xi, psg, order, LOCAL, GENERATOR, PAPER)
        lam = random_lambda(bt)
        scores: list[float] = []
        fitted = personalize(
            bt, task, data, lam, lam > 1.2, order, LOCAL,
            measure=lambda model: scores.append(task.score(model, data, 4).loss),
        )  # fmt: skip
        layers = [value for layer in fitted.weights.layers for value in (layer.A, layer.B)]
        numbers = torch.tensor([*done.stage1_losses, *fitted.losses, *scores])
        return [numbers, done.lam, *done.phi.values(), *layers]

    first = both(KEEPS)
    for mine, wanted in zip(both(KEEPS), first, strict=True):  # computed or found: the same bits
        torch.testing.assert_close(mine, wanted, rtol=0, atol=0)
    assert seen == [(5, 7, 16)]  # once for all epochs, the round, personalization and the score
    each_way(both)
    assert len(seen) > 5


def test_several_clients_in_one_batch() -> None:
    bt = upper()
    seen = first_block_passes(bt.model.get_base_model())
    clients = [
        CohortClient(data, torch.ones(2 * len(bt.linears)), list(local_order(len(data), 2, 3, 0)))
        for data in CLIENTS
    ]

    def together(task: Classification) -> list[Tensor]:
        done = train_cohort(bt, task, clients, tiny_psg(bt), LOCAL, GENERATOR, PAPER)
        return [value for each in done for value in (each.lam, torch.tensor(each.stage1_losses))]

    together(KEEPS)
    assert seen == [(5, 7, 16), (3, 9, 16)]
    each_way(together)


def test_a_cohort_in_which_one_client_has_too_much_text_is_computed_whole() -> None:
    bt = upper()
    seen = first_block_passes(bt.model.get_base_model())
    long = tiny_rows([16] * 1100)  # 1.1 MiB of states
    clients = [
        CohortClient(data, torch.ones(2 * len(bt.linears)), list(local_order(4, 1, 4, 0))[:1])
        for data in (CLIENTS[0], long)
    ]
    done = train_cohort(bt, KEEPS, clients, tiny_psg(bt), LOCAL, GENERATOR, PAPER)
    assert (8, 16, 16) in seen
    assert [len(each.stage1_losses) for each in done] == [1, 1]


@pytest.mark.parametrize("kind", ["standard-fl", "fedit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounds_of_the_base_that_train_its_upper_block(kind: str, dtype: torch.dtype) -> None:
    targets = r".*layer\.1.*dense|classifier"
    base = BaseSettings(kind=kind, target_modules=targets, batch_size=3, epochs=2, lr=1e-2)
    settings = Settings(base=base, local=LOCAL)
    model = BASES[kind].wrap(tiny("bert", dropout=0.0).eval(), settings)
    trained = BASES[kind].trained(model, base)
    before = {name: value.detach().clone() for name, value in trained.items()}
    plain: Any = model.get_base_model() if kind == "fedit" else model
    seen = first_block_passes(plain)

    def rounds(task: Classification) -> list[Tensor]:
        with torch.no_grad():
            for name, value in trained.items():
                value.copy_(before[name])
        losses = []
        for seed in range(2):
            for number, data in enumerate(CLIENTS):
                work = LocalWork(str(number), task, data, settings, dtype, seed)
                losses.append(work.fine_tune(model, trained.values(), base.lr))
        return [torch.tensor(losses), *(value.detach().clone() for value in trained.values())]

    rounds(KEEPS)
    assert seen == [(5, 7, 16), (3, 9, 16)]  # once for all rounds: only what is above changes
    kept, whole = rounds(KEEPS), rounds(TASK)
    loose = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.05, "atol": 2e-2}
    for mine, wanted in zip(kept, whole, strict=True):
        torch.testing.assert_close(mine, wanted, **loose)
    assert any(not torch.equal(value, before[name]) for name, value in trained.items())


def test_a_client_with_its_own_part_of_the_base_gets_its_own_states() -> None:
    bt, data = upper(), CLIENTS[0]
    base = bt.model.get_base_model()
    overlay = Overlay(dict(base.named_parameters()))
    name = "bert.encoder.layer.0.output.dense.weight"
    owners = [torch.full((16, 24), 0.1), torch.eye(16, 24)]
    found = []
    for turn in (0, 1, 0, None):
        values = [] if turn is None else [(name, Replacement(owners[turn]))]
        overlay.put(values)
        found.append(KEEPS.logits(bt.model, data, 4))
        torch.testing.assert_close(found[-1], TASK.logits(bt.model, data, 4), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[2], found[0], rtol=0, atol=0)
    assert float((found[1] - found[0]).abs().max()) > 1e-5
    assert float((found[3] - found[0]).abs().max()) > 1e-5
