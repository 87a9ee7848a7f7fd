"""Ranks by gradient, on models where the right answer is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from one_client import Chosen, adapted, asked, one_client

from fedp2eft.methods import METHODS
from fedp2eft.methods.gradient import LENGTH, ask_sketch, gradient_norms, mean_directions
from fedp2eft.seeding import derive_seed
from tiny import TASK

HEAD = "classifier"


def weight_gradients(client) -> dict[str, torch.Tensor]:
    """∂L/∂W of every adapted layer, by autograd on the plain weights."""
    bt = client.bt
    weights = {layer.name: layer.module.get_base_layer().weight for layer in bt.layers}
    for weight in weights.values():
        weight.requires_grad_(True)
    with bt.off():
        batch = TASK.batch(client.train, np.arange(len(client.train)))
        found = torch.autograd.grad(TASK.loss(bt.model, batch), list(weights.values()))
    for weight in weights.values():
        weight.requires_grad_(False)
    return dict(zip(weights, found, strict=True))


def test_scores_are_gradients_along_the_common_directions() -> None:
    client = one_client()
    found = gradient_norms(client)
    assert found.shape == (len(client.bt.names), 4)
    client.bt.reset()
    s = client.bt.settings.scaling
    for row, (layer, G) in enumerate(
        zip(client.bt.layers, weight_gradients(client).values(), strict=True)
    ):
        want = (s * G @ layer.A.T).norm(dim=0)
        assert torch.allclose(found[row], want, rtol=1e-3, atol=1e-6), layer.name


def test_where_only_the_head_has_a_gradient_it_gets_the_ranks(monkeypatch) -> None:
    """A head of zeros lets no gradient through to the layers below it."""
    bt = adapted()
    with torch.no_grad():
        bt.model.get_base_model().classifier.weight.zero_()
    client, chosen = one_client(bt=bt), Chosen(monkeypatch)
    scores = gradient_norms(client)
    head = bt.names.index(HEAD)
    assert scores[head].min() > 0
    assert scores.sum() == scores[head].sum()
    lam, keep = chosen.of(client, "gradient", 1)
    assert keep[head].all()
    assert keep.sum() == len(bt.names)
    assert torch.equal(lam, torch.ones_like(scores))


def test_sketches_are_random_combinations_of_gradient_rows() -> None:
    client = one_client()
    found = ask_sketch(client, 2)
    s, seed = client.bt.settings.scaling, client.bt.settings.seed
    for name, G in weight_gradients(client).items():
        generator = torch.Generator().manual_seed(derive_seed("sketch", seed, name))
        omega = torch.randn(len(G), 4, generator=generator)
        assert torch.allclose(found[name], s * omega.T @ G, rtol=1e-3, atol=1e-5), name
    assert all(not B.any() for B in client.bt.B)  # left as it was found


def test_directions_span_the_mean_gradient() -> None:
    """Two clients whose gradients are one direction each: both are found, then there are none."""
    one, two = torch.eye(6)[1], torch.eye(6)[4]
    omega = torch.randn(4, 2, generator=torch.Generator().manual_seed(1))
    answers = [omega[:, :1] @ one[None] * 5, omega[:, 1:] @ two[None]]
    A = mean_directions({"layer": sum(answers).double()}, 2)["layer"].float()
    assert A.shape == (4, 6)
    assert not A[2:].any()
    assert A[:2].norm(dim=1).tolist() == pytest.approx([LENGTH] * 2)
    assert pytest.approx(torch.diag(one + two), abs=1e-5) == A.T @ A / LENGTH**2
    assert not mean_directions({"layer": torch.zeros(4, 6)}, 1)["layer"].any()


def test_shared_directions_are_used_and_given_back() -> None:
    client = one_client()
    told = asked("gradient-shared", [client, one_client(1, bt=client.bt)], 2)
    before = [A.clone() for A in client.bt.A]
    outcome = METHODS["gradient-shared"].fit(replace(client, prepared=told), 2)
    assert sum(outcome.weights.ranks.values()) == 2 * len(client.bt.names)
    assert all(torch.equal(a, b) for a, b in zip(before, client.bt.A, strict=True))
    plain = METHODS["gradient"].fit(client, 2)
    assert outcome.scores.loss != plain.scores.loss
    zero = {name: torch.zeros_like(value) for name, value in told.items()}
    same = METHODS["gradient-shared"].fit(replace(client, prepared=zero), 2)
    assert same.scores == plain.scores  # rows of zeros stay as the common A has them
