"""AdaLoRA: PEFT's budget, the objective that is minimised, and the base that is lent for it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from one_client import LOCAL, adapted, one_client
from peft import AdaLoraModel
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn import functional as F

from fedp2eft.adapters.btlora import BTLora
from fedp2eft.errors import UserError
from fedp2eft.methods.adalora import (
    NAME,
    Schedule,
    adalora,
    adapter_weights,
    orthogonality,
    wrap,
)
from fedp2eft.methods.settings import AdaLoraSettings
from fedp2eft.settings.experiment import AdapterSettings
from tiny import TASK, disturb, tiny, tiny_rows

INPUTS = {"input_ids": torch.arange(1, 25).reshape(3, 8), "attention_mask": torch.ones(3, 8).long()}


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(**INPUTS).logits


# ── the base is lent ────────────────────────────────────────────────────────────────────────────


def identities(bt) -> list[tuple[str, int]]:
    named = [*bt.model.named_modules(), *bt.model.named_parameters(), *bt.model.named_buffers()]
    return [(name, id(value)) for name, value in named]


@pytest.mark.parametrize("fails", [False, True])
def test_lent_base_comes_back_as_it_was(fails) -> None:
    bt = adapted()
    disturb(bt)
    before, names, config = logits(bt.model), identities(bt), bt.model.peft_config
    with bt.model.disable_adapter():
        plain = logits(bt.model)
    try:
        with bt.bare() as base:
            assert not any(isinstance(module, LoraLayer) for module in base.modules())
            assert torch.equal(logits(base), plain)
            model = wrap(base, bt, Schedule(3, 2, 6, 0, 1), 0.1)
            nn.init.ones_(next(p for n, p in model.named_parameters() if "lora_E" in n))
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert identities(bt) == names
    assert bt.model.peft_config is bt.model.get_base_model().peft_config is config
    assert torch.equal(logits(bt.model), before)
    with bt.trimmed(torch.ones(len(bt.names), 4), torch.ones(len(bt.names), 4).bool()):
        assert torch.equal(logits(bt.model), plain)  # B = 0
    assert torch.equal(logits(bt.model), before)


def test_client_leaves_nothing_behind_and_runs_alike_again() -> None:
    client = one_client(own=AdaLoraSettings(), bt=adapted(dropout=0.1))
    disturb(client.bt)
    names, before, state = identities(client.bt), logits(client.bt.model), torch.get_rng_state()
    first = adalora(client, 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert identities(client.bt) == names
    assert torch.equal(logits(client.bt.model), before)
    torch.rand(5)
    again = adalora(client, 2)
    assert again.scores == first.scores
    pairs = zip(first.weights.layers, again.weights.layers, strict=True)
    assert all(torch.equal(x.B, y.B) and torch.equal(x.lam, y.lam) for x, y in pairs)


# ── what is minimised ───────────────────────────────────────────────────────────────────────────


def test_run_is_that_of_peft_by_hand() -> None:
    """PEFT adds its penalty to the loss of a model that gets labels; the rest is plain torch."""
    client = one_client(own=AdaLoraSettings())
    found = adalora(client, 2).weights
    bt, s = client.bt, client.own
    order = client.order(client.settings)
    with bt.bare() as base:
        model = wrap(base, bt, Schedule.of(2, len(order), s), s.orth).train()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
        for step, rows in enumerate(order, 1):
            optimizer.zero_grad()
            model.base_model(**TASK.batch(client.train, rows)).loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            model.base_model.update_and_allocate(step)
        expected = adapter_weights(model, bt)
    assert found.ranks == expected.ranks
    for x, y in zip(found.layers, expected.layers, strict=True):
        for name in ("A", "B", "lam"):
            torch.testing.assert_close(getattr(x, name), getattr(y, name), rtol=1e-4, atol=1e-6)


def test_orthogonality_is_what_peft_adds() -> None:
    bt = adapted()
    batch = TASK.batch(tiny_rows([5, 6, 7]), [0, 1, 2])
    with bt.bare() as base:
        model = wrap(base, bt, Schedule(3, 2, 6, 0, 1), 0.7)
        out = model.base_model(**batch)  # PeftModel itself would pass the penalty by
        plain = F.cross_entropy(out.logits, batch["labels"])
        added = out.loss - plain
        torch.testing.assert_close(added, 0.7 * orthogonality(model), rtol=1e-5, atol=1e-6)
        assert added.item() > 0.5


@pytest.mark.parametrize("orth", [0.0, 50.0])
def test_penalty_pulls_towards_orthonormal_factors(orth) -> None:
    client = one_client(own=AdaLoraSettings(orth=orth, lr=5e-2))
    client = replace(client, settings=replace(LOCAL, personalize_epochs=12, batch_size=24))
    layers = [layer for layer in adalora(client, 2).weights.layers if layer.rank]
    far = [float((x.A @ x.A.T - torch.eye(x.rank)).norm()) / x.rank**0.5 for x in layers]
    assert max(far) < 0.5 if orth else min(far) > 0.5


# ── the budget ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("rank", "epochs"), [(1, 1), (2, 1), (3, 3)])
def test_ends_with_the_budget(rank, epochs) -> None:
    client = one_client(own=AdaLoraSettings())
    outcome = adalora(replace(client, settings=replace(LOCAL, personalize_epochs=epochs)), rank)
    ranks = outcome.weights.ranks
    assert list(ranks) == list(client.bt.names)
    assert sum(ranks.values()) == rank * len(ranks)
    assert len(set(ranks.values())) > 1  # layers get different shares
    d = {layer.name: layer.A.shape[1] + layer.B.shape[0] for layer in client.bt.trim(4).layers}
    assert outcome.weights.parameters() == sum(d[name] * k for name, k in ranks.items())


@given(
    rank=st.integers(1, 32),
    steps=st.integers(2, 300),
    shares=st.tuples(st.floats(0, 1), st.floats(0, 1)).filter(lambda pair: sum(pair) < 1),
)
def test_every_schedule_drops_ranks(rank, steps, shares) -> None:
    found = Schedule.of(rank, steps, AdaLoraSettings(tinit=shares[0], tfinal=shares[1]))
    assert found.init_r > found.target_r == rank
    assert 0 <= found.tinit < found.steps - found.tfinal
    assert found.steps - found.tfinal >= 2  # the step before measures what this one ranks


@pytest.mark.parametrize(
    ("rank", "steps", "expected"),
    [
        (2, 100, (3, 10, 30)),
        (4, 10, (6, 1, 3)),
        (3, 5, (4, 0, 1)),
        (1, 2, (2, 0, 0)),
        (16, 3, (24, 0, 0)),
    ],
)
def test_shares_are_rounded_down(rank, steps, expected) -> None:
    found = Schedule.of(rank, steps, AdaLoraSettings())
    assert (found.init_r, found.tinit, found.tfinal) == expected


@pytest.mark.parametrize("epochs", [0, 1])
def test_too_few_steps_is_an_error(epochs) -> None:
    client = one_client(
        own=AdaLoraSettings(), settings=replace(LOCAL, personalize_epochs=epochs, batch_size=24)
    )
    with pytest.raises(UserError, match="needs 2 optimizer steps or more"):
        adalora(client, 2)
    assert logits(client.bt.model) is not None


def test_budget_is_updated_after_every_optimiser_step(monkeypatch) -> None:
    client = one_client(own=AdaLoraSettings(), settings=replace(LOCAL, batch_size=4, accumulate=3))
    update, steps, shares = AdaLoraModel.update_and_allocate, [], []

    def spy(model, step):
        steps.append(step)
        update(model, step)

    monkeypatch.setattr(AdaLoraModel, "update_and_allocate", spy)
    adalora(replace(client, progress=shares.append), 2)
    assert steps == [1, 2, 3, 4]  # 24 rows, twice, by 4, three a step
    assert shares == [0.25, 0.5, 0.75, 1.0]


def test_budget_that_is_never_updated_is_an_error(monkeypatch) -> None:
    monkeypatch.setattr(AdaLoraModel, "update_and_allocate", lambda *_: None)
    with pytest.raises(UserError, match="update_and_allocate was never called"):
        adalora(one_client(own=AdaLoraSettings()), 2)


# ── the adapter ─────────────────────────────────────────────────────────────────────────────────


def test_adapter_is_the_scored_model() -> None:
    client = one_client(own=AdaLoraSettings(lr=0.2))
    outcome = adalora(client, 2)
    merged = tiny("bert", dropout=0.0).eval()
    plain = TASK.score(merged, client.test, 9)
    with torch.no_grad():
        for layer in outcome.weights.folded().layers:
            merged.get_submodule(layer.name).weight += layer.B @ layer.A
    scores = TASK.score(merged, client.test, 9)
    assert scores.correct == outcome.scores.correct
    assert scores.loss == pytest.approx(outcome.scores.loss, abs=1e-5)
    assert abs(scores.loss - plain.loss) > 1e-2


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
@pytest.mark.parametrize("rank", [1, 2])
def test_adapter_is_peft_s_own_change_of_the_weights(kind, rank) -> None:
    bt = adapted(kind)
    with bt.bare() as base:
        model = wrap(base, bt, Schedule.of(rank, 9, AdaLoraSettings()), 0.1)
        model.peft_config[NAME].rank_pattern = {}
        modules = {name: base.get_submodule(name) for name in bt.names}
        with torch.no_grad():
            for row, module in enumerate(modules.values()):
                E = module.lora_E[NAME]
                E.copy_(torch.arange(len(E)).reshape(-1, 1) - row % 2)  # one zero or two
        found = adapter_weights(model, bt)
        assert found.scaling == pytest.approx(2.0, rel=2e-5)  # whatever r is
        for layer in found.layers:
            module = modules[layer.name]
            assert layer.rank == int((module.lora_E[NAME] != 0).sum()) < len(module.lora_E[NAME])
            change = found.scaling * layer.B @ torch.diag(layer.lam) @ layer.A
            if module.fan_in_fan_out:
                change = change.T
            torch.testing.assert_close(change, module.get_delta_weight(NAME).detach())


def test_layer_that_no_row_reaches_takes_no_harm() -> None:
    model = tiny("bert", dropout=0.0).eval()
    model.spare = nn.Linear(4, 4)
    bt = BTLora(model, AdapterSettings(r_max=4))
    assert "spare" in bt.names
    weights = adalora(one_client(own=AdaLoraSettings(), bt=bt), 2).weights
    assert 0 < sum(weights.ranks.values()) <= 2 * len(bt.names)


def test_kind_of_layer_without_adalora_is_a_user_error() -> None:
    names = ["bert.embeddings.word_embeddings", "classifier"]
    bt = BTLora(tiny("bert").eval(), AdapterSettings(r_max=4, target_modules=names))
    with pytest.raises(UserError, match="AdaLoRA cannot adapt this model"):
        adalora(one_client(own=AdaLoraSettings(), bt=bt), 2)
    assert [layer.module for layer in bt.layers] == [
        bt.model.get_base_model().get_submodule(name) for name in bt.names
    ]


@pytest.mark.parametrize(
    "bad", [{"lr": 0.0}, {"orth": -1.0}, {"tinit": 0.5, "tfinal": 0.5}, {"init_multiple": 0.5}]
)
def test_impossible_settings_are_refused(bad) -> None:
    with pytest.raises(UserError, match="adalora"):
        AdaLoraSettings(**bad)
