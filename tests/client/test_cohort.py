"""Several clients in one batch give the numbers of one client at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, replace
from functools import cache
from itertools import chain
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForSequenceClassification

from fedp2eft.adapters.btlora import BTLora
from fedp2eft.adapters.stacked import NotPerRowError, StackedLora, _by_layer, clip_each
from fedp2eft.client.cohort import (
    CohortClient,
    StackedPSG,
    cohort_stage1,
    train_cohort,
    why_alone,
)
from fedp2eft.client.training import Round, features, stage1, stage2, train_round
from fedp2eft.errors import UserError
from fedp2eft.settings.experiment import AdapterSettings, GeneratorSettings, LocalSettings
from fedp2eft.settings.profiles import PAPER, REFERENCE, Profile
from fedp2eft.tasks.classification import Classification
from fedp2eft.tasks.encoded import Encoded, epoch_batches
from golden_case import GoldenCase, case_folders, plain
from tiny import CLASSES, TASK, double_adapter, random_lambda, tiny, tiny_psg, tiny_rows

LOCAL = LocalSettings(dropout=False, batch_size=3, epochs=2, lr=1e-3, lambda_lr=5e-2)
GENERATOR = GeneratorSettings(init_lambda=0.5, steps=3, lr=1e-2)
# Of unequal numbers of rows, so of unequal numbers of steps, last batches and lengths
LENGTHS = [[3, 2], [5, 3, 7, 4, 6, 2], [16, 9, 1, 4], [5, 6, 7, 8]]
Weights = tuple[list[Tensor], list[Tensor], Tensor]


class NextToken(Classification):
    """Every token is predicted from those before it."""

    def batch(self, data: Encoded, indices) -> dict[str, Tensor]:
        batch = super().batch(data, indices)
        batch["labels"] = batch["input_ids"].where(batch["attention_mask"].bool(), -100)
        return batch

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        logits = model(**inputs).logits.float()[:, :-1].flatten(0, 1)
        return F.cross_entropy(logits, batch["labels"][:, 1:].flatten())


def adapter(kind: str, profile: Profile = PAPER, **changes: object) -> tuple[BTLora, object]:
    """An adapted model without dropout, and its task."""
    if kind == "llama classifier":
        config = tiny("llama").config
        config.num_labels, config.pad_token_id = CLASSES, 0
        torch.manual_seed(7)
        base: nn.Module = LlamaForSequenceClassification(config)
    else:
        base = tiny(kind, dropout=0.0)
    bt = BTLora(
        base.eval(),
        AdapterSettings(r_max=3, **changes),
        clamp_forward=profile.clamp_forward,
    )
    return bt, NextToken(pad_id=0, max_length=16) if kind == "llama" else TASK


def cohort(
    bt: BTLora, lengths: Sequence[Sequence[int]], local: LocalSettings = LOCAL
) -> list[CohortClient]:
    found = []
    for number, each in enumerate(lengths):
        data = tiny_rows(each, seed=number)
        order = list(epoch_batches(len(data), local.epochs, local.batch_size, seed=number))
        draw = torch.Generator().manual_seed(number)
        found.append(CohortClient(data, torch.randn(2 * len(bt.linears), generator=draw), order))
    return found


def alone(
    bt: BTLora, task, clients: Sequence[CohortClient], local: LocalSettings, profile: Profile
) -> list[tuple[Round, Weights]]:
    """Every client's round by itself, with its A, B and λ at the end of stage 1."""
    psg, found = tiny_psg(bt, GENERATOR), []
    phi = psg.phi()
    for client in clients:
        psg.set_phi(phi)
        done = train_round(
            bt, task, client.data, client.xi, psg, client.order, local, GENERATOR, profile
        )
        copies = tuple([w.detach().clone() for w in weights] for weights in (bt.A, bt.B))
        found.append((done, (*copies, bt.lam.detach().clone())))
    return found


def together(
    bt: BTLora, task, clients: Sequence[CohortClient], local: LocalSettings, profile: Profile
) -> tuple[list[Round | UserError], list[Weights | None]]:
    """The same in one batch, with the weights of those that take the last step."""
    kept: list[StackedLora] = []

    def keep(*args: object, **kwargs: object) -> StackedLora:
        kept.append(StackedLora(*args, **kwargs))
        return kept[0]

    with patch("fedp2eft.client.cohort.StackedLora", keep):
        psg = tiny_psg(bt, GENERATOR)
        found = train_cohort(bt, task, clients, psg, local, GENERATOR, profile)
    places = sorted(range(len(clients)), key=lambda c: -len(clients[c].order))
    steps = [-(-len(client.order) // local.accumulate) for client in clients]
    return found, [
        of_client(kept[0], places.index(c)) if steps[c] == max(steps) else None
        for c in range(len(clients))
    ]


def of_client(lora: StackedLora, client: int) -> Weights:
    """A, B and λ of one client, A and B by layer."""
    A, B = (
        [value[client] for value in _by_layer(shapes, values)]
        for shapes, values in ((lora._in, lora.A), (lora._out, lora.B))
    )
    return A, B, lora.lam[client]


def check_same(
    bt: BTLora, task, clients: Sequence[CohortClient], local: LocalSettings, profile: Profile
) -> dict[str, float]:
    """Assert that both ways give the same numbers; returns the largest deviations."""
    assert why_alone(bt, local) is None
    one, (many, weights) = (
        alone(bt, task, clients, local, profile),
        together(bt, task, clients, local, profile),
    )
    worst = dict.fromkeys(("loss", "lambda", "A", "B", "phi", "psg loss"), 0.0)

    def note(kind: str, difference: Tensor) -> None:
        worst[kind] = max(worst[kind], float(difference.abs().max()))

    assert any(weights)
    for (want, (A, B, lam)), got, last in zip(one, many, weights, strict=True):
        assert isinstance(got, Round)
        assert got.examples == want.examples
        assert len(got.stage1_losses) == len(want.stage1_losses)
        if want.stage1_losses:
            a, b = torch.tensor(got.stage1_losses), torch.tensor(want.stage1_losses)
            note("loss", (a - b) / b.abs())
        mine, theirs = (torch.tensor(astuple(done.stage1_terms)) for done in (got, want))
        note("loss", (mine - theirs) / theirs.abs().clamp(min=1e-3))
        loss = want.stage1_losses[-1] if want.stage1_losses else 0.0
        assert float(theirs.sum()) == pytest.approx(loss, rel=1e-5)
        assert got.lam.shape == want.lam.shape
        note("lambda", got.lam - want.lam)
        if last:
            note("lambda", last[2].detach() - lam)
            for kind, mine, theirs in (("A", last[0], A), ("B", last[1], B)):
                for x, y in zip(mine, theirs, strict=True):
                    note(kind, (x - y).detach())
        assert list(got.phi) == list(want.phi)
        for name, value in want.phi.items():
            note("phi", got.phi[name] - value)
        note("psg loss", torch.tensor((got.psg_loss - want.psg_loss) / max(1, want.psg_loss)))
    assert max(worst.values()) <= 1e-5, worst
    return worst


# ── equality ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("kind", "profile", "layerwise"),
    [
        ("bert", PAPER, False),
        ("bert", PAPER, True),
        ("bert", REFERENCE, False),
        ("bert", REFERENCE, True),
        ("llama", PAPER, False),
        ("llama", REFERENCE, True),
        ("llama classifier", PAPER, False),
    ],
)
def test_a_cohort_equals_one_client_at_a_time(kind, profile, layerwise) -> None:
    bt, task = adapter(kind, profile, layerwise=layerwise)
    worst = check_same(bt, task, cohort(bt, LENGTHS), LOCAL, profile)
    print(kind, profile.name, layerwise, {key: f"{value:.1e}" for key, value in worst.items()})


@pytest.mark.parametrize(
    ("change", "limits"),
    [
        ({"accumulate": 2}, {}),
        ({"accumulate": 3, "batch_size": 1}, {}),
        ({"max_grad_norm": 1e-3}, {}),
        ({"alpha_task": 0.5, "alpha_s": 3.0, "alpha_p": 0.2}, {}),
        ({"epochs": 0}, {}),
        ({}, {"lambda_min": 0.49, "lambda_max": 0.52}),
        ({}, {"target_modules": ["query", "output.dense", "classifier"], "scaling": 1.5}),
    ],
    ids=["accumulate", "accumulate ones", "clip", "weights", "no epochs", "clamp", "other layers"],
)  # fmt: skip
@pytest.mark.parametrize("profile", [PAPER, REFERENCE], ids=lambda p: p.name)
def test_every_setting_means_the_same(profile, change, limits) -> None:
    bt, task = adapter("bert", profile, **limits)
    local = replace(LOCAL, **change)
    check_same(bt, task, cohort(bt, LENGTHS, local), local, profile)


@cache
def double() -> BTLora:
    """In float64 no gradient is so near 0 that Adam would make a step out of its rounding."""
    return double_adapter(settings=AdapterSettings(r_max=2))


@settings(max_examples=8, deadline=None)
@given(
    lengths=st.lists(
        st.lists(st.integers(2, 12), min_size=1, max_size=6), min_size=1, max_size=4
    ),
    batch_size=st.integers(1, 4),
    accumulate=st.integers(1, 3),
    profile=st.sampled_from([PAPER, REFERENCE]),
)  # fmt: skip
def test_clients_of_any_sizes(lengths, batch_size, accumulate, profile) -> None:
    # Rows of one token are left out: their attention has no gradient, and whether that is 0 or
    # 1e-20 decides where |B| goes from 0.
    bt = double()
    local = replace(LOCAL, batch_size=batch_size, accumulate=accumulate)
    # λ = 0.5 is inside the range, where the gates of both profiles do the same
    check_same(bt, TASK, cohort(bt, lengths, local), local, profile)


@pytest.mark.parametrize("folder", case_folders(), ids=lambda p: p.name)
def test_the_golden_numbers_in_one_batch(folder) -> None:
    case = GoldenCase.load(folder)
    t, facts = case.tensors, case.facts
    bt, task, local = case.adapter(), case.task(), case.local_settings()
    assert local.dropout  # the setting is on, but this model has none
    assert why_alone(bt, local) is None
    psg = case.psg(bt)
    phi = psg.phi()
    train = [case.data(k, "train") for k in case.clients]
    xi = [features(bt, task, data, local, REFERENCE) for data in train]
    worst: dict[str, float] = {}
    entries = apart = 0

    def close(kind: str, got: Tensor, want: Tensor, limit: float) -> None:
        worst[kind] = max(worst.get(kind, 0.0), float((got - want).abs().max()))
        assert worst[kind] <= limit, kind

    for round_ in case.rounds:
        keys = [f"round{round_}.client{k}" for k in case.clients]
        clients = [
            CohortClient(train[k], xi[k], case.order(key))
            for k, key in zip(case.clients, keys, strict=True)
        ]
        psg.set_phi(phi)
        found = train_cohort(bt, task, clients, psg, local, case.generator_settings(), REFERENCE)
        ranked = sorted(case.clients, key=lambda k: -len(clients[k].order))
        lora = StackedLora(
            bt, torch.stack([psg(xi[k]).detach() for k in ranked]), clamp_forward=False
        )
        ended = cohort_stage1(lora, bt, task, [clients[k] for k in ranked], local, REFERENCE)
        most = len(clients[ranked[0]].order)
        for k, key in zip(case.clients, keys, strict=True):
            done = found[k]
            assert isinstance(done, Round)
            golden = torch.tensor(facts["stage1_losses"][key])
            close("loss", torch.tensor(done.stage1_losses) / golden, torch.ones(()), 1e-4)
            A, B, _ = of_client(lora, ranked.index(k))
            lam = ended[ranked.index(k)].lam
            close("lambda", lam, t[f"{key}.lambda_after_stage1"], 1e-5)
            if len(clients[k].order) < most:
                continue  # its A and B are no longer what they were at its own last step
            for name, *both in zip(facts["lora_module_names"], A, B, strict=True):
                for which, value in zip(("lora_A", "lora_B"), both, strict=True):
                    want = t.get(f"{key}.lora_after_stage1.{name}.{which}.weight")
                    if want is not None:
                        assert plain(name) in bt.names
                        entries += value.numel()
                        apart += int(((value - want).abs() > 1e-5).sum())
            ratio = torch.tensor(done.psg_loss) / t[f"{key}.mean_psg_loss"]
            close("loss", ratio, torch.ones(()), 1e-4)
            for name, value in case.starting(f"{key}.psg_after_stage2.").items():
                close("weights", done.phi[name], value, 1e-5)
        total = sum(map(len, train))
        phi = {
            name: sum(
                done.phi[name] * (len(data) / total)
                for done, data in zip(found, train, strict=True)
            )
            for name in phi
        }
        for name, value in case.starting(f"round{round_}.psg_aggregated.").items():
            close("weights", phi[name], value, 1e-5)
    assert set(worst) == {"loss", "lambda", "weights"}
    # An entry of B that comes back to 0 but for its last bits takes its next step, of 1e-4, to the
    # side that rounding puts it on: the gradient of |B| jumps there.
    assert entries
    assert apart <= max(1, entries / 10_000)
    print("largest deviations:", {kind: f"{value:.1e}" for kind, value in worst.items()})
    print(f"{apart} of {entries} entries of A and B are apart")


def test_a_base_in_bf16_multiplies_in_bf16_and_trains_in_fp32() -> None:
    base = tiny("bert", dropout=0.0).to(torch.bfloat16).eval()
    bt = BTLora(base, AdapterSettings(r_max=3))
    clients = cohort(bt, LENGTHS)
    one, (many, weights) = (
        alone(bt, TASK, clients, LOCAL, PAPER),
        together(bt, TASK, clients, LOCAL, PAPER),
    )
    for (want, _), got in zip(one, many, strict=True):
        assert got.stage1_losses == pytest.approx(want.stage1_losses, rel=1e-2)
    for A, B, lam in filter(None, weights):
        assert {value.dtype for value in chain(A, B, [lam])} == {torch.float32}


# ── what may go wrong ───────────────────────────────────────────────────────────────────────────


def test_a_loss_that_is_not_finite_is_the_error_of_its_own_client() -> None:
    def with_a_bad_word() -> tuple[BTLora, list[CohortClient]]:
        base = tiny("bert", dropout=0.0).eval()
        with torch.no_grad():
            base.bert.embeddings.word_embeddings.weight[39] = math.nan
        bt = BTLora(base, AdapterSettings(r_max=3))
        clients = []
        for client in cohort(bt, [[5] * 6] * 3):
            client.data.tokens[client.data.tokens == 39] = 1
            clients.append(client)
        bad = clients[1]
        bad.data.tokens[bad.data.offsets[int(bad.order[1][0])]] = 39  # in the second mini-batch
        return bt, clients

    bt, clients = with_a_bad_word()
    got = train_cohort(bt, TASK, clients, tiny_psg(bt, GENERATOR), LOCAL, GENERATOR, PAPER)
    bt, clients = with_a_bad_word()
    with pytest.raises(UserError) as error:
        alone(bt, TASK, clients[1:2], LOCAL, PAPER)
    assert isinstance(got[1], UserError)
    assert str(got[1]) == str(error.value)
    assert "nan at step 2" in str(got[1])
    for c in (0, 2):
        want = alone(bt, TASK, clients[c : c + 1], LOCAL, PAPER)[0][0]
        assert isinstance(got[c], Round)
        assert got[c].stage1_losses == pytest.approx(want.stage1_losses, rel=1e-5)
        assert torch.allclose(got[c].lam, want.lam, atol=1e-5, rtol=0)


def test_a_layer_that_sees_no_rows_is_refused() -> None:
    bt, _ = adapter("bert")
    lora = StackedLora(bt, torch.full((2, len(bt.names), 3), 0.5))
    inputs = TASK.batch(tiny_rows([3] * 5), range(5))
    inputs.pop("labels")
    with lora.active():
        lora.load(2, 3)  # six rows are promised
        with pytest.raises(NotPerRowError, match=r"query"):
            bt.model(**inputs)


def test_the_shared_adapter_is_back_afterwards() -> None:
    bt, _ = adapter("bert")
    bt.model.train()
    clients = cohort(bt, LENGTHS[:2])
    bt.reset(random_lambda(bt))
    want = stage1(bt, TASK, clients[0].data, clients[0].order, LOCAL, PAPER)
    flags = [p.requires_grad for p in bt.model.parameters()]
    psg = tiny_psg(bt, GENERATOR)
    phi, seen = psg.phi(), []
    train_cohort(bt, TASK, clients, psg, LOCAL, GENERATOR, PAPER, on_step=seen.append)
    assert len(seen) == max(len(client.order) for client in clients)
    assert bt.model.training
    assert [p.requires_grad for p in bt.model.parameters()] == flags
    assert all(torch.equal(psg.phi()[name], value) for name, value in phi.items())
    assert not any(layer.module.get_base_layer()._forward_hooks for layer in bt.layers), (
        "a hook is left"
    )
    bt.reset(random_lambda(bt))
    assert stage1(bt, TASK, clients[0].data, clients[0].order, LOCAL, PAPER) == want


def test_why_clients_train_alone() -> None:
    dropping = LocalSettings(dropout=True)
    bert = BTLora(tiny("bert", dropout=0.1), AdapterSettings(r_max=2))
    assert "local.dropout" in str(why_alone(bert, dropping))
    assert why_alone(bert, LOCAL) is None
    quiet = tiny("llama")
    assert why_alone(BTLora(quiet, AdapterSettings(r_max=2)), dropping) is None
    quiet.config.attention_dropout = 0.1  # no module shows it
    assert "local.dropout" in str(why_alone(BTLora(quiet, AdapterSettings(r_max=2)), dropping))
    assert "Conv1D" in str(why_alone(BTLora(tiny("gpt2", 0.0), AdapterSettings(r_max=2)), LOCAL))
    words = AdapterSettings(r_max=2, target_modules=["word_embeddings", "query"])
    assert "Embedding" in str(why_alone(BTLora(tiny("bert", 0.0), words), LOCAL))
    saving = tiny("bert", 0.0)
    saving.gradient_checkpointing_enable({"use_reentrant": False})
    assert "checkpointing" in str(why_alone(BTLora(saving, AdapterSettings(r_max=2)), dropping))


def test_the_clip_is_each_clients_own() -> None:
    gradients = [torch.randn(3, 2, 4), torch.randn(3, 5) * torch.tensor([[0.0], [1.0], [50.0]])]
    gradients[0][0] *= 1e-3
    want = [[g[c].clone() for g in gradients] for c in range(3)]
    for c in range(3):
        holders = [nn.Parameter(torch.zeros_like(g)) for g in want[c]]
        for holder, gradient in zip(holders, want[c], strict=True):
            holder.grad = gradient
        nn.utils.clip_grad_norm_(holders, 1.0)
    stacked = [nn.Parameter(torch.zeros_like(g)) for g in gradients]
    for holder, gradient in zip(stacked, gradients, strict=True):
        holder.grad = gradient
    clip_each([*stacked, nn.Parameter(torch.zeros(3, 1))], 1.0)
    for c in range(3):
        for got, gradient in zip(gradients, want[c], strict=True):
            assert torch.allclose(got[c], gradient, rtol=1e-6, atol=0)


def test_stage2_starts_every_client_from_the_servers_phi() -> None:
    bt, _ = adapter("bert")
    psg = tiny_psg(bt, GENERATOR)
    xi = torch.randn(2, psg.config.n_features)
    target = torch.rand(2, len(bt.names), 3)
    several = StackedPSG(psg, 2, xi.device)
    got, phis = stage2(several, xi, target, GENERATOR).tolist(), several.phis()
    for c in range(2):
        one = tiny_psg(bt, GENERATOR)
        assert got[c] == pytest.approx(stage2(one, xi[c], target[c], GENERATOR).item(), rel=1e-5)
        for name, value in one.phi().items():
            assert torch.allclose(phis[c][name], value, atol=1e-5, rtol=0)
    assert not torch.allclose(phis[0]["last_layer.bias"], phis[1]["last_layer.bias"], atol=1e-3)
    several = StackedPSG(psg, 2, xi.device)
    assert stage2(several, xi, target, replace(GENERATOR, steps=0)).tolist() == [0.0, 0.0]
    for phi in several.phis():
        assert all(torch.equal(phi[name], value) for name, value in psg.phi().items())
