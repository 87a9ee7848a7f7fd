"""BT-LoRA and the controls that take FedP²EFT's strategy apart."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from one_client import LOCAL, Chosen, adapted, asked, features, one_client, trained_psg
from torch import Tensor

from fedp2eft.adapters.btlora import BTLora
from fedp2eft.adapters.budget import keep_largest
from fedp2eft.client.descent import local_order
from fedp2eft.client.training import stage1
from fedp2eft.errors import UserError
from fedp2eft.experiment.compare import compare
from fedp2eft.methods import METHODS, check_private, check_trained_for
from fedp2eft.seeding import derive_seed
from fedp2eft.settings.experiment import (
    AdapterSettings,
    EvaluationSettings,
    GeneratorSettings,
    Settings,
)
from fedp2eft.settings.peers import PrivacySettings
from fedp2eft.settings.profiles import PAPER
from tiny import TASK, tiny

R_MAX, LAYERS = 4, 14


@pytest.fixture(scope="module")
def bt() -> BTLora:
    return adapted(r_max=R_MAX)


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> Chosen:
    return Chosen(monkeypatch)


def kept_values(lam: Tensor, keep: Tensor) -> list[float]:
    return sorted(lam[keep].tolist())


def predicted(client, rank: int) -> tuple[Tensor, Tensor]:
    """λ̂ and its mask, from the PSG's own weights."""
    psg, xi = client.psg, client.features()
    with torch.no_grad():
        lam = psg.last_layer(psg.first_layer(xi)).reshape(LAYERS, R_MAX).clamp(1e-4, 1000)
    order = sorted(range(lam.numel()), key=lambda i: (-float(lam.flatten()[i]), i))
    keep = torch.zeros(lam.numel(), dtype=torch.bool)
    keep[order[: rank * LAYERS]] = True
    return lam, keep.reshape(lam.shape)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_structure_keeps_the_ranks_alone(bt, chosen, rank) -> None:
    client = one_client(bt=bt)
    lam, keep = chosen.of(client, "fedp2eft-structure", rank)
    assert torch.equal(keep, predicted(client, rank)[1])
    assert set(lam[keep].tolist()) == {1.0}


@pytest.mark.parametrize("rank", [1, 3])
def test_scale_keeps_the_mean_alone(bt, chosen, rank) -> None:
    client = one_client(bt=bt)
    lam, keep = chosen.of(client, "fedp2eft-scale", rank)
    full, mask = predicted(client, rank)
    assert torch.equal(keep, torch.arange(R_MAX).expand(LAYERS, -1) < rank)
    assert lam[keep].tolist() == pytest.approx([float(full[mask].mean())] * (rank * LAYERS))


@given(rank=st.integers(1, R_MAX), seed=st.integers(0, 2**31))
def test_random_structure_carries_the_same_values(rank, seed) -> None:
    with pytest.MonkeyPatch.context() as patch:
        chosen, client = Chosen(patch), replace(CLIENT, seed=seed)
        lam, keep = chosen.of(client, "fedp2eft-random", rank)
        full, mask = predicted(client, rank)
        assert keep.shape == full.shape
        assert int(keep.sum()) == rank * LAYERS
        assert kept_values(lam, keep) == pytest.approx(kept_values(full, mask), rel=1e-6)
        assert torch.equal(lam, chosen.of(client, "fedp2eft-random", rank)[0])


CLIENT = one_client(bt=adapted(r_max=R_MAX))


def test_random_structure_is_another_for_another_client(chosen) -> None:
    masks = [
        chosen.of(replace(CLIENT, seed=seed), "fedp2eft-random", 2)[1] for seed in range(100, 130)
    ]
    own = predicted(CLIENT, 2)[1]
    assert len({tuple(mask.flatten().tolist()) for mask in [own, *masks]}) == 31
    # About half of 56 entries each time: all of them are drawn sooner or later.
    assert torch.stack(masks).any(dim=0).all()


def test_random_structure_shuffles_the_values(chosen) -> None:
    """The largest λ does not stay with the first drawn rank, nor the order with the layers'."""
    lam, keep = chosen.of(CLIENT, "fedp2eft-random", 4)
    full, _ = predicted(CLIENT, 4)
    assert bool(keep.all())
    assert not torch.allclose(lam, full)


@pytest.mark.parametrize("layerwise", [False, True])
def test_global_lambda_is_one_for_all(chosen, layerwise) -> None:
    model = tiny("bert", dropout=0.0).eval()
    bt = BTLora(model, AdapterSettings(r_max=R_MAX, layerwise=layerwise))
    psg = trained_psg(bt)
    clients = [one_client(n, bt=bt, psg=psg) for n in range(3)]
    told = asked("fedp2eft-global", clients, 2)
    with torch.no_grad():
        mean = sum(psg(features(psg, n)) for n in range(3)) / 3
    torch.testing.assert_close(told["lambda"], mean)
    found = [
        chosen.of(replace(client, prepared=told), "fedp2eft-global", 2)
        for client in [*clients, one_client(7, bt=bt, psg=psg)]
    ]
    for lam, keep in found:
        torch.testing.assert_close(lam, mean.expand(LAYERS, R_MAX))
        assert torch.equal(keep, keep_largest(mean.expand(LAYERS, R_MAX), 2))
    own = chosen.of(clients[0], "fedp2eft", 2)[0]
    assert not torch.allclose(own, found[0][0])


# ── BT-LoRA ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("init", [1e-4, 0.3])
def test_bt_lora_is_stage_1_then_personalization(chosen, init) -> None:
    bt = adapted()
    psg = trained_psg(bt)
    made = replace(psg.config.generator, init_lambda=init)
    psg.config = replace(psg.config, generator=made)
    client = one_client(bt=bt, psg=psg, settings=replace(LOCAL, epochs=3, personalize_epochs=1))
    lam, keep = chosen.of(client, "bt-lora", 2)
    fresh = adapted()
    fresh.reset(init)
    seed = derive_seed("stage 1", client.seed)
    order = local_order(24, 3, 6, seed)
    losses = stage1(fresh, TASK, client.train, order, client.settings, PAPER, seed=seed)
    assert len(losses) == 12
    torch.testing.assert_close(lam, fresh.lam.detach().clamp(1e-4, 1000))
    assert torch.equal(keep, keep_largest(lam, 2))
    assert float(lam.max()) > init + 0.1  # it learned


def test_bt_lora_does_not_depend_on_who_was_there_before() -> None:
    client = one_client()
    first = METHODS["bt-lora"].fit(client, 1)
    METHODS["bt-lora"].fit(one_client(1, bt=client.bt), 1)
    again = METHODS["bt-lora"].fit(client, 1)
    assert again.scores == first.scores
    assert sum(again.weights.ranks.values()) == LAYERS


def test_bt_lora_tells_its_progress_over_both_parts() -> None:
    shares: list[float] = []
    settings = replace(LOCAL, epochs=1, personalize_epochs=1, batch_size=12)
    METHODS["bt-lora"].fit(one_client(settings=settings, progress=shares.append), 1)
    assert shares == [0.25, 0.5, 0.75, 1.0]


# ── variants ────────────────────────────────────────────────────────────────────────────────────


def test_variant_needs_a_psg_trained_for_it() -> None:
    with pytest.raises(UserError) as caught:
        check_trained_for("fedp2eft-layerwise", Settings())
    assert str(caught.value) == (
        "Method fedp2eft-layerwise needs a PSG trained with adapter.layerwise: true, and this run "
        "has false: set it, or use `fedp2eft compare`."
    )
    check_trained_for("fedp2eft-layerwise", Settings(adapter=AdapterSettings(layerwise=True)))
    for name in ("lora", "fedp2eft", "label-prior"):
        check_trained_for(name, Settings())


def test_unknown_method_is_named_with_the_nearest() -> None:
    with pytest.raises(UserError, match="Did you mean 'fedp2eft-structure'"):
        check_trained_for("fedp2eft-struct", Settings())


def test_untrained_psg_predicts_the_initial_lambda(bt) -> None:
    """BT-LoRA starts from where the federation starts."""
    assert (
        one_client(bt=bt).psg.config.generator.init_lambda
        == GeneratorSettings().init_lambda
        == 1e-4
    )


def test_rounds_that_are_not_private_are_refused_where_privacy_is_on():
    private = Settings(privacy=PrivacySettings(clipping="fixed", clip_norm=1.0))
    with pytest.raises(UserError, match="privacy covers the PSG's rounds, not FedL2P's"):
        check_trained_for("fedl2p", private)
    check_trained_for("fedp2eft", private)
    check_trained_for("fedl2p", Settings())


def test_answers_about_a_clients_own_rows_are_refused_where_privacy_is_on(tmp_path):
    private = Settings(privacy=PrivacySettings(clipping="fixed", clip_norm=1.0))
    for name, method in METHODS.items():
        if method.surveys:
            with pytest.raises(UserError, match=f"what method {re.escape(name)} asks every seen"):
                check_private(name, private)
        elif name not in ("fedl2p", "fedl2p+prior", "fedl2p+calibrated-prior"):
            check_private(name, private)
        check_private(name, Settings())
    asking = replace(private, evaluation=EvaluationSettings(methods=["lora-tuned"]))
    with pytest.raises(UserError, match="what method lora-tuned asks"):
        compare(asking, tmp_path / "run")
    assert not (tmp_path / "run").exists()
