"""FedL2P: the meta-net, a client's round, and personalization at learning rates of one's own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from one_client import LOCAL, adapted, one_client
from torch import Tensor

from fedp2eft.client.phase import VALIDATION_LOSS
from fedp2eft.errors import DivergedError, UserError
from fedp2eft.methods import METHODS, ClientSide
from fedp2eft.methods.fedl2p.meta_net import MetaNet
from fedp2eft.methods.fedl2p.method import train_round
from fedp2eft.methods.fedl2p.settings import FedL2PSettings
from fedp2eft.settings.reading import settings_from

XI = torch.tensor([0.3, -0.2, 1.1])
FAST = FedL2PSettings(rank=2, hidden=8, init_lr=1e-4, meta_lr=1e-2, lr_lr=1e-4)
ONCE = replace(FAST, steps=1)


def net_for(client: ClientSide, settings: FedL2PSettings = FAST) -> MetaNet:
    features = len(client.features())
    return MetaNet(features, settings.hidden, 2 * len(client.bt.names), settings.init_lr)


# ── the meta-net ────────────────────────────────────────────────────────────────────────────────


def test_the_meta_net_written_out() -> None:
    net = MetaNet(3, 100, 8, init_lr=0.5)
    w = net.eta()
    assert {name: tuple(value.shape) for name, value in w.items()} == {
        "lr": (8,),
        "layers.0.weight": (100, 3), "layers.0.bias": (100,),
        "layers.1.weight": (100, 100), "layers.1.bias": (100,),
        "layers.2.weight": (8, 100), "layers.2.bias": (8,),
    }  # fmt: skip
    hidden = XI
    for layer in (0, 1):
        hidden = (w[f"layers.{layer}.weight"] @ hidden + w[f"layers.{layer}.bias"]).clamp(min=0)
    outputs = (w["layers.2.weight"] @ hidden + w["layers.2.bias"]).clamp(0, 1000)
    assert torch.allclose(net(XI), (outputs * w["lr"]).reshape(4, 2), rtol=1e-6)


def test_first_weights() -> None:
    net = MetaNet(300, 200, 400)
    w = net.eta()
    for name, fans in (("0", 500), ("1", 400), ("2", 600)):
        deviation = 0.1 * (2 / fans) ** 0.5  # Xavier-normal, gain 0.1
        assert w[f"layers.{name}.weight"].std().item() == pytest.approx(deviation, rel=0.02)
        assert bool((w[f"layers.{name}.bias"] == 1).all())
    assert bool((w["lr"] == 1e-4).all())
    same, other = MetaNet(300, 200, 400), MetaNet(300, 200, 400, seed=1)
    assert torch.equal(same.layers[0].weight, net.layers[0].weight)
    assert not torch.equal(other.layers[0].weight, net.layers[0].weight)
    state = torch.get_rng_state()
    MetaNet(3, 3, 4)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("output", "rate"), [(-3.0, 0.0), (2.0, 0.2), (4000.0, 100.0)])
def test_clamping_lets_gradients_through(output: float, rate: float) -> None:
    net = MetaNet(3, 4, 2, init_lr=0.1)
    with torch.no_grad():
        net.layers[2].weight.zero_()
        net.layers[2].bias.fill_(output)
    rates = net(XI)
    assert rates.tolist() == [pytest.approx([rate, rate])]
    rates[0, 1].backward()
    assert net.layers[2].bias.grad.tolist() == pytest.approx([0.0, 0.1])
    assert net.lr.grad.tolist() == pytest.approx([0.0, rate / 0.1])


def test_a_learnable_rate_below_zero_is_no_step_uphill() -> None:
    net = MetaNet(3, 4, 2, init_lr=-0.1)
    rates = net(XI)
    assert rates.tolist() == [[0.0, 0.0]]
    rates.sum().backward()
    assert bool((net.lr.grad > 0).all())


def test_a_meta_net_from_its_numbers() -> None:
    net = MetaNet(3, 7, 6, init_lr=0.3, seed=4)
    assert torch.equal(MetaNet.of(net.eta())(XI), net(XI))


# ── personalization ─────────────────────────────────────────────────────────────────────────────


def numbers_giving(client: ClientSide, rates: Tensor) -> dict[str, Tensor]:
    """Numbers of a meta-net that answers any ξ with these rates."""
    net = net_for(client)
    with torch.no_grad():
        net.layers[2].weight.zero_()
        net.layers[2].bias.fill_(1.0)
        net.lr.copy_(rates.flatten())
    return net.eta()


@pytest.mark.parametrize("rank", [1, 3])
def test_the_same_rate_everywhere_is_plain_lora(rank: int) -> None:
    lr = 2.0**-7  # the same number in float32 and float64
    client = one_client(settings=replace(LOCAL, personalize_lr=lr))
    rates = torch.full((len(client.bt.names), 2), lr)
    mine = METHODS["fedl2p"].fit(replace(client, shared=numbers_giving(client, rates)), rank)
    plain = METHODS["lora"].fit(client, rank)
    assert mine.weights is not None
    assert plain.weights is not None
    for left, right in zip(mine.weights.layers, plain.weights.layers, strict=True):
        assert left.rank == rank
        assert torch.equal(left.A, right.A)
        assert torch.equal(left.B, right.B)
    assert mine.scores == plain.scores


def test_every_matrix_has_a_rate_of_its_own() -> None:
    client = one_client()
    rates = torch.zeros(len(client.bt.names), 2)
    rates[2, 1] = rates[4, 0] = rates[4, 1] = 1e-2
    moved = METHODS["fedl2p"].fit(replace(client, shared=numbers_giving(client, rates)), 2).weights
    assert moved is not None
    start = [A[:2] for A in client.bt._common_A]
    for row, (layer, A) in enumerate(zip(moved.layers, start, strict=True)):
        assert torch.equal(layer.A, A) == (row != 4)
        assert bool(layer.B.any()) == (row in (2, 4))


# ── a client's round ────────────────────────────────────────────────────────────────────────────


def learnable(**changes: Any) -> ClientSide:
    """A client whose label is the first token's size, and whose rows are many."""
    client = one_client(**changes)
    for rows in (client.train, client.test):
        rows.labels[:] = rows.tokens[rows.offsets[:-1]] % 2
    return client


def test_rounds_find_learning_rates_that_train() -> None:
    """From 1e-4, which moves nothing in eight steps; with the wrong sign the rates would fall."""
    client = learnable()
    net, fast = net_for(client), replace(FAST, lr_lr=3e-4)
    first = net(client.features()).mean().item()
    results = [train_round(client, net, fast, seed) for seed in range(5)]
    assert net(client.features()).mean().item() > 5 * first
    assert results[-1][VALIDATION_LOSS] < results[0][VALIDATION_LOSS] - 0.05
    assert results[-1]["loss"] < results[0]["loss"]


def test_a_round_depends_on_its_seed_alone_and_leaves_the_adapter() -> None:
    client = one_client(bt=adapted(dropout=0.1))
    before = {name: value.clone() for name, value in client.bt.model.state_dict().items()}
    found = []
    for seed, noise in ((1, 0), (1, 99), (2, 0)):
        torch.manual_seed(noise)
        net = net_for(client)
        found.append((train_round(client, net, ONCE, seed), net.eta()))
    after = client.bt.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert found[0][0] == found[1][0] != found[2][0]
    assert all(torch.equal(found[0][1][name], found[1][1][name]) for name in found[0][1])
    assert any(not torch.equal(found[0][1][name], found[2][1][name]) for name in found[0][1])


def test_steps_of_the_two_optimisers() -> None:
    """Adam's first step is its learning rate, up or down; two outer steps make at most two."""
    client = one_client()
    for steps in (1, 2):
        net = net_for(client)
        first = net.eta()
        train_round(client, net, replace(FAST, steps=steps), 0)
        for name, value in net.eta().items():
            lr = FAST.lr_lr if name == "lr" else FAST.meta_lr
            change = (value - first[name]).abs()
            assert change.max().item() <= steps * lr * 1.001
            if steps == 1 and name == "lr":
                assert change.median().item() == pytest.approx(lr, rel=0.01)


def test_progress_ends_at_one() -> None:
    heard: list[float] = []
    client = one_client(progress=heard.append)
    train_round(client, net_for(client), FAST, 0)
    assert heard == sorted(heard)
    assert len(heard) == 3 * 2 * 4  # outer steps × epochs × mini-batches of 6 of 19 rows
    assert heard[-1] == 1.0


def test_the_held_out_rows_stay_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    client = one_client()
    trial = client.trial(0.2)
    seen: dict[str, set[tuple[int, ...]]] = {"descend": set(), "held": set()}
    from fedp2eft.methods.fedl2p import method

    gradient, batch = method._mean_gradient, type(client.task).batch
    where = ["descend"]

    def mean_gradient(*args: Any) -> Any:
        where[0] = "held"
        try:
            return gradient(*args)
        finally:
            where[0] = "descend"

    def watched(task: Any, data: Any, rows: Any) -> Any:
        made = batch(task, data, rows)
        seen[where[0]] |= {tuple(r.tolist()) for r in data_rows(data, rows)}
        return made

    def data_rows(data: Any, rows: Any) -> list[Any]:
        return [data.tokens[data.offsets[i] : data.offsets[i + 1]] for i in rows]

    monkeypatch.setattr(method, "_mean_gradient", mean_gradient)
    monkeypatch.setattr(type(client.task), "batch", watched)
    train_round(client, net_for(client), ONCE, 0)
    train_round(client, net_for(client), ONCE, 1)
    held = {tuple(r.tolist()) for r in data_rows(trial.test, range(len(trial.test)))}
    kept = {tuple(r.tolist()) for r in data_rows(trial.train, range(len(trial.train)))}
    assert len(held) == 5
    assert seen["held"] == held
    assert seen["descend"] == kept
    assert not held & kept


def test_a_single_row_is_both() -> None:
    client = one_client()
    client = replace(client, train=client.train.select([0]))
    result = train_round(client, net_for(client), ONCE, 0)
    assert result[VALIDATION_LOSS] > 0


def test_attention_that_has_no_second_derivative_is_not_taken() -> None:
    """The tiny BERT's default is torch's fused attention, whose backward cannot be derived."""
    client = one_client()
    assert client.bt.model.config._attn_implementation == "sdpa"
    client.bt.model.eval()
    loss = client.task.loss(client.bt.model, client.task.batch(client.train, range(4)))
    [slope] = torch.autograd.grad(loss, [client.bt.B[0]], create_graph=True)
    with pytest.raises(RuntimeError, match=r"derivative for .* is not implemented"):
        torch.autograd.grad(slope.sum(), [client.bt.B[0]])
    train_round(client, net_for(client), ONCE, 0)


def test_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A base in bf16 gives the hyper-gradient of one in fp32, but for rounding."""
    from fedp2eft.adapters.btlora import BTLora
    from fedp2eft.methods.fedl2p import method
    from fedp2eft.settings.experiment import AdapterSettings
    from tiny import tiny

    found = []
    original = method.hyper_gradient
    monkeypatch.setattr(
        method, "hyper_gradient", lambda *a, **k: found.append(original(*a, **k)) or found[-1]
    )
    for dtype in (torch.float32, torch.bfloat16):
        bt = BTLora(tiny("bert", 0.0).to(dtype).eval(), AdapterSettings(r_max=4))
        client = one_client(bt=bt)
        settings = replace(ONCE, init_lr=1e-2)
        train_round(client, net_for(client, settings), settings, 0)
    full, half = (torch.cat([g.flatten() for g in gradients]) for gradients in found)
    assert torch.cosine_similarity(full, half, dim=0).item() > 0.98


def test_a_hyper_gradient_that_is_not_finite_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from fedp2eft.methods.fedl2p import method

    def nowhere(_client: Any, _data: Any, weights: Any) -> tuple[float, list[Tensor]]:
        return float("nan"), [torch.full_like(weight, float("nan")) for weight in weights]

    monkeypatch.setattr(method, "_mean_gradient", nowhere)
    client = one_client()
    net = net_for(client)
    before = net.eta()
    with pytest.raises(DivergedError, match=r"held-out loss nan.*lower fedl2p\.init_lr"):
        train_round(client, net, FAST, 0)
    assert all(torch.equal(value, before[name]) for name, value in net.eta().items())


# ── settings ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rounds": -1}, "fedl2p.rounds"),
        ({"patience": 0}, "fedl2p.patience"),
        ({"rank": 0}, "fedl2p.rank"),
        ({"hidden": 0}, "fedl2p.hidden"),
        ({"steps": 0}, "fedl2p.steps"),
        ({"terms": 0}, "fedl2p.terms"),
        ({"hyper_lr": 0.0}, "fedl2p.hyper_lr"),
        ({"meta_lr": 0.0}, "fedl2p.meta_lr"),
        ({"lr_lr": -1.0}, "fedl2p.lr_lr"),
        ({"init_lr": 0.0}, "fedl2p.init_lr"),
        ({"validation": 0.0}, "fedl2p.validation"),
        ({"validation": 1.0}, "fedl2p.validation"),
    ],
)
def test_impossible_settings(change: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        FedL2PSettings(**change)


def test_a_rank_above_r_max_matters_only_where_fedl2p_is_a_method() -> None:
    settings_from({"fedl2p": {"rank": 64}})
    with pytest.raises(UserError, match=r"fedl2p\.rank is 64; give at most adapter\.r_max = 32"):
        settings_from({"fedl2p": {"rank": 64}, "evaluation": {"methods": ["fedl2p"]}})
