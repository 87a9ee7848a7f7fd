"""The variant `prior: normalized`: its penalty, its resting point, and the PSG that predicts log λ.

Stage 1 step by step is in test_client.py, several clients in one batch in adapters/test_cohort.py.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fedp2eft
from fedp2eft.adapters.btlora import BTLora
from fedp2eft.adapters.budget import keep_largest
from fedp2eft.client.training import features, stage1, stage2, structure, train_round
from fedp2eft.errors import UserError
from fedp2eft.experiment.train import train
from fedp2eft.generator import LOG_LAMBDA, PSG
from fedp2eft.methods import METHODS
from fedp2eft.settings.experiment import AdapterSettings, GeneratorSettings, LocalSettings
from fedp2eft.settings.profiles import PAPER
from fedp2eft.tasks.encoded import epoch_batches
from tiny import TASK, disturb, double_adapter, random_lambda, tiny, tiny_psg, tiny_rows
from tiny_run import World, write_jsonl

DATA = tiny_rows([5, 3, 7, 4, 6, 2])
LOCAL = LocalSettings(dropout=False, prior="normalized", alpha=0.5, lambda_lr=0.1)
NARROW, WIDE = "k_proj", "up_proj"  # 8 and 24 outputs in the tiny Llama


def made(targets: list[str], prior: str = "normalized", **limits: object) -> BTLora:
    settings = AdapterSettings(r_max=3, target_modules=targets, **limits)
    return double_adapter("llama", settings, prior)


# ── the penalty ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("layerwise", [False, True], ids=["rank-wise", "layer-wise"])
@pytest.mark.parametrize("anchored", [False, True], ids=["from-zero", "from-B0"])
def test_the_penalty_and_its_gradients_equal_a_plain_loop(layerwise, anchored) -> None:
    bt = made([NARROW, WIDE], layerwise=layerwise, lambda_max=1.8)
    lam = random_lambda(bt).double()
    lam[1, :2] = torch.tensor([1e-6, 5.0])  # outside the range on both sides
    lam = lam[:, :1] if layerwise else lam
    bt.set_lambda(lam)
    assert torch.allclose(bt.lam, lam.log())
    B0 = [torch.zeros_like(B) for B in bt.B]
    if anchored:
        disturb(bt, seed=1)
        bt.anchor()
        B0 = [B.detach().clone() for B in bt.B]
    disturb(bt, seed=2)
    alpha, n, value = 0.7, 37, 0.0
    of_theta = torch.zeros(len(bt.names), 3, dtype=torch.float64)
    of_B = [torch.zeros_like(B) for B in bt.B]
    for row, (B, before) in enumerate(zip(bt.B, B0, strict=True)):
        width = len(B)
        for i in range(3):
            size = min(max(float(lam[row, 0 if layerwise else i]), 1e-4), 1.8)
            change = [float(B[j, i] - before[j, i]) for j in range(width)]
            mean = sum(map(abs, change)) / width
            value += alpha / n * (mean / size + math.log(size))
            of_theta[row, i] = alpha / n * (1 - mean / size)
            for j in range(width):
                of_B[row][j, i] = alpha / n / size / width * math.copysign(1, change[j])
    got = bt.penalty(n, alpha=alpha)
    assert float(got) == pytest.approx(value, rel=1e-9)
    got.backward()
    if layerwise:
        of_theta = of_theta.sum(dim=1, keepdim=True)
    assert torch.allclose(bt.lam.grad, of_theta, rtol=1e-6)
    for B, want in zip(bt.B, of_B, strict=True):
        assert torch.allclose(B.grad, want, rtol=1e-6)


def resting_point(bt: BTLora) -> Tensor:
    """λ where the penalty is least for the present B, found by minimising over what is trained."""
    optimizer = torch.optim.LBFGS(
        [bt.lam], max_iter=500, tolerance_grad=1e-12, tolerance_change=0,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = bt.penalty(1, alpha=1.0)
        loss.backward()
        return loss

    optimizer.step(closure)
    return bt.rank_lambda()


def means(bt: BTLora) -> Tensor:
    return torch.stack([B.detach().abs().mean(dim=0) for B in bt.B])


def test_the_resting_point_is_the_mean_of_b() -> None:
    bt = made([NARROW, WIDE])
    bt.set_lambda(0.5)
    disturb(bt)
    assert len({len(B) for B in bt.B}) == 2
    assert (resting_point(bt) - means(bt)).abs().max() < 1e-5


@pytest.mark.parametrize("prior", ["normalized", "gamma"])
def test_only_the_normalized_prior_is_blind_to_the_width_of_a_layer(prior) -> None:
    bt = made([NARROW, WIDE], prior)
    bt.set_lambda(0.5)
    with torch.no_grad():
        for B in bt.B:  # of either sign, of mean size 0.3
            B.copy_(0.3 * torch.cat([torch.ones_like(B[::2]), -torch.ones_like(B[1::2])]))
    widths = torch.tensor([len(B) for B in bt.B])
    found = resting_point(bt)
    narrow, wide = found[widths == widths.min()], found[widths == widths.max()]
    if prior == "normalized":
        assert (found - 0.3).abs().max() < 1e-5
    else:  # 100·λ² + λ = (α_s / α_p)·d_out·mean |B|
        for width, row in zip(widths.tolist(), found, strict=True):
            want = (-1 + math.sqrt(1 + 4 * 100 * 1e4 * width * 0.3)) / 200
            assert row.tolist() == pytest.approx([want] * 3, rel=1e-4)
        assert wide.min() > 1.5 * narrow.max()


def test_the_forward_pass_sees_the_exponential_inside_its_range() -> None:
    ids = torch.arange(1, 13).reshape(2, 6)
    found = []
    for prior in ("gamma", "normalized"):
        bt = made([NARROW, WIDE], prior, lambda_min=0.1, lambda_max=0.6)
        disturb(bt)
        bt.set_lambda(torch.tensor([[0.01, 0.3, 2.0]]).double())
        assert torch.allclose(bt.clamped_lambda()[0], torch.tensor([0.1, 0.3, 0.6]).double())
        assert torch.allclose(bt.rank_lambda(), bt.clamped_lambda())
        found.append(bt.model(input_ids=ids).logits)
    assert torch.allclose(*found, atol=1e-9)


# ── the PSG ─────────────────────────────────────────────────────────────────────────────────────


def log_psg(bt: BTLora, init_lambda: float = 0.2, **more: object) -> PSG:
    generator = GeneratorSettings(init_lambda=init_lambda, **more)
    return tiny_psg(bt, generator, target=LOG_LAMBDA)


def test_an_untrained_psg_predicts_the_log_of_the_first_lambda() -> None:
    psg = log_psg(BTLora(tiny("bert"), AdapterSettings(r_max=3)), init_lambda=0.02)
    xi = torch.ones(psg.config.n_features)
    assert (psg(xi) - math.log(0.02)).abs().max() < 1e-5
    assert (psg.lambda_for(xi) - 0.02).abs().max() < 1e-6


def test_predictions_are_clamped_to_the_logs_of_the_range() -> None:
    psg = log_psg(BTLora(tiny("bert"), AdapterSettings(r_max=3, lambda_min=0.1, lambda_max=9.0)))
    xi = torch.ones(psg.config.n_features)
    with torch.no_grad():
        psg.last_layer.bias.copy_(torch.linspace(-5, 5, len(psg.last_layer.bias)))
    raw = torch.linspace(-5, 5, len(psg.last_layer.bias)).reshape(-1, 3)
    assert (psg(xi) - raw.clamp(math.log(0.1), math.log(9.0))).abs().max() < 1e-5
    assert (psg.lambda_for(xi) - raw.exp().clamp(0.1, 9.0)).abs().max() < 1e-4


def test_the_config_of_an_older_psg_means_lambda(tmp_path) -> None:
    tiny_psg(BTLora(tiny("bert"), AdapterSettings(r_max=2))).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    written = json.loads(path.read_text())
    assert written.pop("target") == "lambda"
    path.write_text(json.dumps(written))
    assert PSG.from_pretrained(tmp_path).config.target == "lambda"


# ── a round and personalization ─────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("layerwise", [False, True])
def test_stage2_regresses_on_the_log_of_what_stage1_found(layerwise) -> None:
    settings = AdapterSettings(r_max=2, layerwise=layerwise, lambda_min=0.19)
    bt = BTLora(tiny("bert", dropout=0.0), settings, prior="normalized")
    psg, other = log_psg(bt, steps=1), log_psg(bt, steps=1)
    xi = features(bt, TASK, DATA, LOCAL, PAPER)
    order = list(epoch_batches(6, 2, 4, seed=0))
    bt.reset(0.2)
    losses = stage1(bt, TASK, DATA, order, LOCAL, PAPER)
    theta = bt.lam.detach().clamp(min=math.log(0.19))
    assert (bt.lam < math.log(0.19)).any()
    wanted = float((other(xi) - theta).abs().sum().detach())
    got = train_round(bt, TASK, DATA, xi, psg, order, LOCAL, psg_settings(1), PAPER)
    assert got.stage1_losses == pytest.approx(losses, rel=1e-5)
    assert got.psg_loss == pytest.approx(wanted, rel=1e-4)
    assert torch.allclose(got.lam, theta.exp().expand(-1, 2), atol=1e-5)
    before = (psg(xi) - theta).abs().sum()
    stage2(psg, xi, theta.exp(), psg_settings(300))
    assert (psg(xi) - theta).abs().sum() < before / 5


def psg_settings(steps: int) -> GeneratorSettings:
    return GeneratorSettings(init_lambda=0.2, steps=steps, lr=1e-3)


def test_kept_lambda_has_mean_one_and_the_largest_are_kept() -> None:
    bt = BTLora(tiny("bert"), AdapterSettings(r_max=4))
    psgs = [log_psg(bt), tiny_psg(bt)]
    spread = torch.rand(len(bt.names) * 4, generator=torch.Generator().manual_seed(1)) * 4
    for psg in psgs:
        with torch.no_grad():
            psg.last_layer.bias.copy_(spread)
        xi = torch.ones(psg.config.n_features)
        theta = psg(xi).detach()
        for rank in (1, 2, 4):
            lam, keep = structure(psg, xi, rank)
            assert torch.equal(keep, keep_largest(theta, rank))
            if psg is psgs[0]:
                assert float(lam[keep].mean()) == pytest.approx(1.0, abs=1e-6)
                ratio = lam / theta.exp()
                assert torch.allclose(ratio, ratio[0, 0].expand_as(ratio), rtol=1e-5)
            else:
                assert torch.equal(lam, theta)


# ── a whole run ─────────────────────────────────────────────────────────────────────────────────


def test_a_federation_under_the_normalized_prior(world: World, tmp_path: Path) -> None:
    quick = {"base__kind": "none", "federation__rounds": 2, "federation__clients_per_round": 4}
    only = {"methods": ["fedp2eft-normalized"], "ranks": [2], "pools": ["unseen"]}
    settings = world.settings(**quick, evaluation=only, local__prior="normalized")
    results = train(settings, tmp_path / "run")
    assert [(row.method, row.rank, row.clients) for row in results.rows] == [
        ("fedp2eft-normalized", 2, 2)
    ]
    psg = PSG.from_pretrained(tmp_path / "run" / "psg")
    assert psg.config.target == LOG_LAMBDA
    moved = psg.last_layer.bias - math.log(0.5)
    assert moved.abs().max() > 1e-2
    rows = write_jsonl(tmp_path / "rows.jsonl", world.client_rows("fr-unseen-00", "train"))
    adapter = fedp2eft.personalize(psg, tmp_path / "run" / "base", rows, 2, precision="fp32")
    kept = torch.cat([layer.lam for layer in adapter.weights.layers])
    assert len(kept) == 2 * len(psg.config.layer_names)
    assert float(kept.mean()) == pytest.approx(1.0, abs=1e-5)
    assert kept.max() > kept.min()


def test_the_variant_names_its_prior() -> None:
    assert METHODS["fedp2eft-normalized"].variant["local"]["prior"] == "normalized"


def test_the_reference_profile_has_no_normalized_prior(world: World) -> None:
    with pytest.raises(UserError, match=r"federation\.profile is reference.*local\.prior"):
        world.settings(local__prior="normalized", federation__profile="reference")
    with pytest.raises(UserError, match="prior"):
        world.settings(local__prior="uniform")
    with pytest.raises(UserError, match=r"local\.alpha must be 0 or more"):
        world.settings(local__alpha=-1.0)
