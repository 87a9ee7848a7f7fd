"""What a client does, checked against the same steps written out in plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedp2eft.adapters.btlora import BTLora
from fedp2eft.adapters.budget import keep_largest
from fedp2eft.client.descent import adamw, descend, local_order
from fedp2eft.client.training import features, personalize, stage1, stage2, structure, train_round
from fedp2eft.errors import UserError
from fedp2eft.settings.experiment import AdapterSettings, GeneratorSettings, LocalSettings
from fedp2eft.settings.profiles import PAPER
from fedp2eft.tasks.encoded import Encoded, epoch_batches
from tiny import TASK, disturb, double_adapter, random_lambda, tiny, tiny_psg, tiny_rows

DATA = tiny_rows([5, 3, 7, 4, 6, 2])
STEADY = LocalSettings(dropout=False)


class Line(nn.Module):
    """y = w·x: a model whose gradients are easy to write down."""

    def __init__(self, w: float = 0.0) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w))
        self.drop = nn.Dropout(0.5)


X = torch.tensor([1.0, -2.0, 3.0, 0.5])
ROWS = [np.array([0]), np.array([1]), np.array([2]), np.array([3])]


def squares(line: Line):
    return lambda rows: ((line.w * X[rows] - 1) ** 2).mean()


# ── the training loop ───────────────────────────────────────────────────────────────────────────


def test_accumulated_mini_batches_equal_one_big_batch() -> None:
    results = []
    for size, accumulate in ((4, 1), (2, 2), (1, 4)):
        bt = double_adapter()
        bt.reset(random_lambda(bt))
        order = list(np.arange(4).reshape(-1, size)) * 2
        settings = LocalSettings(dropout=False, accumulate=accumulate, batch_size=size)
        losses = stage1(bt, TASK, DATA, order, settings, PAPER)
        results.append((losses, bt.lam.detach().clone(), [B.detach().clone() for B in bt.B]))
    for losses, lam, B in results[1:]:
        assert losses == pytest.approx(results[0][0], rel=1e-6)
        assert torch.allclose(lam, results[0][1], atol=1e-6, rtol=0)
        for mine, whole in zip(B, results[0][2], strict=True):
            assert torch.allclose(mine, whole, atol=1e-6, rtol=0)


def test_a_last_group_that_is_not_full_still_makes_a_step() -> None:
    line = Line()
    optimizer = torch.optim.SGD([line.w], lr=0.0)
    losses = descend(line, squares(line), ROWS[:3], optimizer, [], LocalSettings(accumulate=2))
    assert losses == [1.0, 1.0]
    steps: list[float] = []
    line = Line()
    optimizer = torch.optim.SGD([line.w], lr=0.1)
    descend(
        line, squares(line), ROWS[:3], optimizer, [], LocalSettings(accumulate=2),
        on_step=lambda loss: steps.append(line.w.item()),
    )  # fmt: skip
    first = -0.1 * np.mean([-2 * 1.0, -2 * -2.0])
    assert steps[0] == pytest.approx(first)
    assert steps[1] == pytest.approx(first - 0.1 * 2 * 3.0 * (3.0 * first - 1))


def test_gradients_are_zeroed_between_steps() -> None:
    line, seen = Line(), []
    optimizer = torch.optim.SGD([line.w], lr=0.0)
    descend(
        line, squares(line), ROWS[:2], optimizer, [], LocalSettings(),
        on_step=lambda loss: seen.append(line.w.grad.item()),
    )  # fmt: skip
    assert seen == [-2.0, 4.0]


def test_parameters_left_out_of_zero_add_their_gradients_up() -> None:
    line, seen = Line(), []
    optimizer = torch.optim.SGD([line.w], lr=0.0)
    descend(
        line, squares(line), ROWS[:2], optimizer, [], LocalSettings(), zero=[],
        on_step=lambda loss: seen.append(line.w.grad.item()),
    )  # fmt: skip
    assert seen == [-2.0, 2.0]


def test_the_clip_scales_a_and_b_together_and_leaves_lambda_alone() -> None:
    raw, clipped = [], []
    for bound, kept in ((1e9, raw), (0.01, clipped)):
        bt = double_adapter()
        disturb(bt)
        bt.set_lambda(random_lambda(bt))
        stage1(
            bt, TASK, DATA, [np.arange(6)], LocalSettings(dropout=False, max_grad_norm=bound), PAPER
        )
        kept += [p.grad.clone() for p in (*bt.A, *bt.B, bt.lam)]
    norm = torch.cat([g.reshape(-1) for g in raw[:-1]]).norm()
    assert norm > 1
    for before, after in zip(raw[:-1], clipped[:-1], strict=True):
        assert torch.allclose(after, before * (0.01 / (norm + 1e-6)), rtol=1e-9)
    assert torch.equal(raw[-1], clipped[-1])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_loss_that_is_not_finite_is_an_error_and_takes_no_step(bad) -> None:
    line = Line(0.5)

    def loss_of(rows):
        return line.w * (bad if rows[0] == 1 else 1.0)

    optimizer = torch.optim.SGD([line.w], lr=0.1)
    with pytest.raises(UserError, match=r"loss is (nan|inf) at step 2"):
        descend(line.eval(), loss_of, ROWS, optimizer, [line.w], LocalSettings())
    assert line.w.item() == pytest.approx(0.4)
    assert not line.training


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("dropout", [True, False])
def test_dropout_follows_the_setting_and_the_mode_comes_back(before, dropout) -> None:
    line, seen = Line().train(before), []

    def loss_of(rows):
        seen.append(line.drop.training)
        return line.w * 1.0

    optimizer = torch.optim.SGD([line.w], lr=0.1)
    descend(line, loss_of, ROWS[:1], optimizer, [line.w], LocalSettings(dropout=dropout))
    assert seen == [dropout]
    assert line.training is before


def test_dropout_is_drawn_from_the_seed_and_not_from_the_global_random_state() -> None:
    def losses(seed: int, **settings: object) -> list[float]:
        bt = BTLora(tiny("bert", dropout=0.5), AdapterSettings(r_max=2))
        order, state = [np.arange(6)] * 2, torch.get_rng_state()
        found = stage1(bt, TASK, DATA, order, LocalSettings(**settings), PAPER, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        return found

    torch.manual_seed(1)
    one = losses(3)
    torch.rand(5)
    assert losses(3) == one
    assert losses(4) != one
    assert losses(3, dropout=False) == losses(4, dropout=False)


def test_every_step_is_reported() -> None:
    seen: list[float] = []
    bt = double_adapter()
    order = list(epoch_batches(6, 2, 4, seed=0))
    assert stage1(bt, TASK, DATA, order, STEADY, PAPER, on_step=seen.append) == seen
    assert len(seen) == 4


def test_gradient_checkpointing_gives_the_same_run() -> None:
    runs = []
    for checkpointing in (False, True):
        bt = BTLora(tiny("bert", dropout=0.0), AdapterSettings(r_max=2))
        bt.reset(random_lambda(bt))
        if checkpointing:
            bt.model.gradient_checkpointing_enable({"use_reentrant": False})
        runs.append((stage1(bt, TASK, DATA, [np.arange(6)] * 2, LocalSettings(), PAPER), bt.lam))
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-6)
    assert torch.allclose(runs[0][1], runs[1][1], atol=1e-6)


# ── stage 1, written out ────────────────────────────────────────────────────────────────────────


class HandAdamW:
    """AdamW without weight decay, from its formula."""

    def __init__(self, values: list[Tensor], lr: float) -> None:
        self.values, self.lr, self.t = values, lr, 0
        self.m = [torch.zeros_like(v) for v in values]
        self.v = [torch.zeros_like(v) for v in values]

    def step(self, grads: list[Tensor]) -> None:
        self.t += 1
        for value, grad, m, v in zip(self.values, grads, self.m, self.v, strict=True):
            m.mul_(0.9).add_(0.1 * grad)
            v.mul_(0.999).add_(0.001 * grad**2)
            m_hat, v_hat = m / (1 - 0.9**self.t), v / (1 - 0.999**self.t)
            value.data -= self.lr * m_hat / (v_hat.sqrt() + 1e-8)


def stage1_by_hand(
    bt: BTLora, lam: Tensor, order: list[np.ndarray], s: LocalSettings
) -> Iterator[tuple[float, list[Tensor], list[Tensor], Tensor]]:
    """Stage 1 of profile `paper` on the plain base model: (L, A, B, λ) after every step."""
    plain = tiny("bert", dropout=0.0).double().eval()
    low, high, n = bt.settings.lambda_min, bt.settings.lambda_max, len(DATA)
    A = [a.detach().clone().requires_grad_() for a in bt.A]
    B = [torch.zeros_like(b, requires_grad=True) for b in bt.B]
    lam = lam.double().clone().requires_grad_()
    ab, of_lambda = HandAdamW(A + B, s.lr), HandAdamW([lam], s.lambda_lr)
    for rows in order:
        clamped = lam + (lam.clamp(low, high) - lam).detach()
        weights = {
            f"{name}.weight": plain.get_submodule(name).weight.detach()
            + 2 * B[i] @ torch.diag(clamped[i]) @ A[i]
            for i, name in enumerate(bt.names)
        }
        longest = max(len(DATA.tokens[DATA.offsets[i] : DATA.offsets[i + 1]]) for i in rows)
        ids, mask = (torch.zeros(len(rows), longest, dtype=torch.int64) for _ in range(2))
        for at, i in enumerate(rows):
            row = torch.tensor(DATA.tokens[DATA.offsets[i] : DATA.offsets[i + 1]])
            ids[at, : len(row)], mask[at, : len(row)] = row, 1
        out = functional_call(plain, weights, kwargs={"input_ids": ids, "attention_mask": mask})
        labels = torch.from_numpy(DATA.labels[rows])
        fit = -out.logits.log_softmax(dim=1)[torch.arange(len(rows)), labels].mean()
        significance = sum((b.abs() / clamped[i]).sum() for i, b in enumerate(B))
        sparsity = (100 * clamped + clamped.log()).sum()
        prior = s.alpha_s / n * significance + s.alpha_p / n * sparsity
        loss = s.alpha_task * fit + prior
        grads = torch.autograd.grad(loss, [*A, *B, lam])
        norm = torch.sqrt(sum((g**2).sum() for g in grads[:-1]))
        scale = min(1.0, float(s.max_grad_norm / (norm + 1e-6)))
        ab.step([g * scale for g in grads[:-1]])
        of_lambda.step([grads[-1]])
        yield loss.item(), A, B, lam


@pytest.mark.parametrize("outside", [False, True], ids=["inside", "crosses the range"])
def test_stage1_equals_the_same_steps_written_out(outside) -> None:
    limits = {"lambda_min": 0.49, "lambda_max": 0.52} if outside else {}
    bt = double_adapter(settings=AdapterSettings(r_max=3, **limits))
    lam = random_lambda(bt, low=0.45, high=0.55)
    bt.reset(lam)
    settings = LocalSettings(batch_size=4, lr=1e-3, alpha_task=1.5, dropout=False)
    order = list(epoch_batches(len(DATA), 3, 4, seed=1))
    by_hand = stage1_by_hand(bt, lam, order, settings)
    steps = []

    def compare(loss: float) -> None:
        want, A, B, lam = next(by_hand)
        steps.append(loss)
        assert loss == pytest.approx(want, rel=1e-6)  # the task loss is float32
        for mine, theirs in ((bt.A, A), (bt.B, B), ([bt.lam], [lam])):
            for one, other in zip(mine, theirs, strict=True):
                assert (one - other).abs().max() < 1e-6

    stage1(bt, TASK, DATA, order, settings, PAPER, on_step=compare)
    assert len(steps) == 6
    if outside:
        assert (bt.lam < 0.49).any()
    assert bt.B[0].abs().max() > 1e-4


def test_adamw_decays_nothing() -> None:
    w = nn.Parameter(torch.ones(3))
    w.grad = torch.zeros(3)
    adamw([{"params": [w], "lr": 0.5}]).step()
    assert torch.equal(w.detach(), torch.ones(3))


# ── stage 2 ─────────────────────────────────────────────────────────────────────────────────────


def test_stage2_equals_adam_written_out() -> None:
    bt = double_adapter()
    settings = GeneratorSettings(steps=7, lr=1e-3)
    psg = tiny_psg(bt, settings).double()
    xi = torch.randn(psg.config.n_features, generator=torch.Generator().manual_seed(1)).double()
    target = random_lambda(bt, low=-0.1, high=0.1).double()
    p = {name: value.detach().clone().requires_grad_() for name, value in psg.named_parameters()}
    optimizer, losses = HandAdamW(list(p.values()), settings.lr), []
    for _ in range(settings.steps):
        hidden = p["first_layer.0.weight"] @ xi + p["first_layer.0.bias"]
        hidden = hidden.clamp(min=0) + p["first_layer.1.weight"] * hidden.clamp(max=0)
        raw = (p["last_layer.weight"] @ hidden + p["last_layer.bias"]).reshape(target.shape)
        clamped = raw + (raw.clamp(1e-4, 1000.0) - raw).detach()
        loss = (clamped - target).abs().sum()
        losses.append(loss.item())
        optimizer.step(list(torch.autograd.grad(loss, list(p.values()))))
    assert stage2(psg, xi, target, settings).item() == pytest.approx(np.mean(losses), rel=1e-9)
    for name, value in psg.named_parameters():
        assert (value - p[name]).abs().max() < 1e-6, name
    assert losses[-1] < losses[0]


def test_stage2_starts_with_a_fresh_optimiser_each_time() -> None:
    bt = double_adapter()
    settings = GeneratorSettings(steps=3)
    xi, target = torch.ones(2 * len(bt.linears)), torch.full((len(bt.names), 4), 0.2)
    psg = tiny_psg(bt, settings)
    start = psg.phi()
    one = stage2(psg, xi, target, settings)
    psg.set_phi(start)
    assert stage2(psg, xi, target, settings) == one


def test_no_steps_leave_the_psg_as_it_was() -> None:
    bt = double_adapter()
    psg = tiny_psg(bt)
    start = psg.phi()
    xi, target = torch.ones(psg.config.n_features), torch.ones(len(bt.names), 4)
    assert stage2(psg, xi, target, GeneratorSettings(steps=0)) == 0.0
    assert all(torch.equal(psg.phi()[name], value) for name, value in start.items())


# ── a round ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("layerwise", [False, True])
def test_a_round_is_prediction_then_stage1_then_stage2(layerwise) -> None:
    settings = AdapterSettings(r_max=2, layerwise=layerwise)
    generator = GeneratorSettings(init_lambda=0.4)
    bt = BTLora(tiny("bert", dropout=0.0), settings)
    psg = tiny_psg(bt, generator)
    xi = features(bt, TASK, DATA, STEADY, PAPER)
    order = list(epoch_batches(6, 1, 4, seed=0))

    bt.reset(psg(xi).detach())
    losses = stage1(bt, TASK, DATA, order, STEADY, PAPER)
    lam = bt.lam.detach().clone()
    other = tiny_psg(bt, generator)
    psg_loss = stage2(other, xi, lam, generator).item()

    disturb(bt)  # what an earlier client left behind does not matter
    got = train_round(bt, TASK, DATA, xi, psg, order, STEADY, generator, PAPER)
    assert got.stage1_losses == losses
    assert sum(astuple(got.stage1_terms)) == pytest.approx(losses[-1])
    assert got.examples == 6
    assert got.psg_loss == psg_loss
    assert torch.equal(got.lam, lam.expand(-1, 2))
    assert all(torch.equal(got.phi[name], value) for name, value in other.phi().items())
    assert (lam - 0.4).abs().max() > 1e-3


def test_a_reply_does_not_change_when_the_next_client_trains() -> None:
    bt = BTLora(tiny("bert", dropout=0.0), AdapterSettings(r_max=2))
    psg, order = tiny_psg(bt), [np.arange(6)]
    xi = features(bt, TASK, DATA, STEADY, PAPER)

    def go():
        return train_round(bt, TASK, DATA, xi, psg, order, STEADY, GeneratorSettings(), PAPER)

    first = go()
    phi, lam = {k: v.clone() for k, v in first.phi.items()}, first.lam.clone()
    go()
    assert torch.equal(first.lam, lam)
    assert all(torch.equal(first.phi[name], value) for name, value in phi.items())


# ── personalization ─────────────────────────────────────────────────────────────────────────────


def test_personalize_leaves_the_shared_adapter_alone() -> None:
    bt = BTLora(tiny("bert"), AdapterSettings(r_max=4))
    disturb(bt)
    bt.set_lambda(random_lambda(bt, seed=5))
    before = {name: value.detach().clone() for name, value in bt.model.named_parameters()}
    flags = [p.requires_grad for p in bt.model.parameters()]
    lam = random_lambda(bt)
    measured: list[Tensor] = []
    fitted = personalize(
        bt, TASK, DATA, lam, keep_largest(lam, 1), [np.arange(6)] * 2, STEADY,
        measure=lambda model: measured.append(TASK.logits(model, DATA, 6)),
    )  # fmt: skip
    after = dict(bt.model.named_parameters())
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert [p.requires_grad for p in bt.model.parameters()] == flags
    assert all(p.grad is None for p in bt.model.parameters())
    assert not torch.allclose(measured[0], TASK.logits(bt.model, DATA, 6))
    assert int((fitted.lam > 0).sum()) == sum(fitted.weights.ranks.values()) == len(bt.names)
    assert len(fitted.losses) == 2


def test_personalize_trains_the_kept_ranks_as_written_out() -> None:
    bt = double_adapter()
    lam = random_lambda(bt)
    keep = keep_largest(lam, 2)
    settings = LocalSettings(dropout=False, personalize_lr=1e-3)
    order = list(epoch_batches(len(DATA), 2, 4, seed=1))
    plain = tiny("bert", dropout=0.0).double().eval()
    A = [a.detach()[k].clone().requires_grad_() for a, k in zip(bt.A, keep, strict=True)]
    B = [
        torch.zeros(b.shape[0], int(k.sum())).double().requires_grad_()
        for b, k in zip(bt.B, keep, strict=True)
    ]
    optimizer, losses = HandAdamW(A + B, 1e-3), []
    for rows in order:
        weights = {
            f"{name}.weight": plain.get_submodule(name).weight.detach()
            + 2 * B[i] @ torch.diag(lam[i][keep[i]].double()) @ A[i]
            for i, name in enumerate(bt.names)
        }
        batch = TASK.batch(DATA, rows)
        labels = batch.pop("labels")
        logits = functional_call(plain, weights, kwargs=batch).logits
        loss = nn.functional.cross_entropy(logits, labels)
        grads = torch.autograd.grad(loss, A + B)
        norm = torch.sqrt(sum((g**2).sum() for g in grads))
        optimizer.step([g * min(1.0, 1 / (float(norm) + 1e-6)) for g in grads])
        losses.append(loss.item())
    fitted = personalize(bt, TASK, DATA, lam, keep, order, settings)
    assert fitted.losses == pytest.approx(losses, abs=1e-6)
    for i, layer in enumerate(fitted.weights.layers):
        assert torch.allclose(layer.A, A[i].detach(), atol=1e-6, rtol=0)
        assert torch.allclose(layer.B, B[i].detach(), atol=1e-6, rtol=0)
    assert torch.equal(fitted.lam, lam * keep)


def test_the_rate_of_personalization_is_its_own() -> None:
    bt = BTLora(tiny("bert", dropout=0.0), AdapterSettings(r_max=2))
    lam = random_lambda(bt)

    def largest_b(**settings: float) -> float:
        local = LocalSettings(dropout=False, **settings)
        fitted = personalize(bt, TASK, DATA, lam, lam > 0, [np.arange(6)], local)
        return max(float(layer.B.abs().max()) for layer in fitted.weights.layers)

    assert largest_b(personalize_lr=3e-3, lr=1.0) == pytest.approx(3e-3, rel=1e-2)


def test_structure_keeps_the_budget_of_a_rankwise_and_a_layerwise_psg() -> None:
    for layerwise in (False, True):
        bt = BTLora(tiny("bert"), AdapterSettings(r_max=4, layerwise=layerwise))
        psg = tiny_psg(bt)
        with torch.no_grad():
            psg.last_layer.bias.add_(torch.rand(psg.last_layer.bias.shape))
        xi = torch.ones(psg.config.n_features)
        lam, keep = structure(psg, xi, 2)
        assert lam.shape == keep.shape == (len(bt.names), 4)
        assert torch.equal(lam, psg(xi).detach().expand(-1, 4))
        assert not lam.requires_grad
        assert torch.equal(keep, keep_largest(lam, 2))


# ── order ───────────────────────────────────────────────────────────────────────────────────────


def test_every_row_comes_once_per_epoch_in_batches_of_the_given_size() -> None:
    batches = list(epoch_batches(10, 3, 4, seed=0))
    assert [len(batch) for batch in batches] == [4, 4, 2] * 3
    epochs = [np.concatenate(batches[i : i + 3]).tolist() for i in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_the_same_seed_gives_the_same_order_and_another_seed_another() -> None:
    def order(seed: int) -> list[int]:
        return np.concatenate(list(local_order(20, 2, 8, seed))).tolist()

    np.random.seed(1)
    first = order(5)
    np.random.seed(2)
    assert order(5) == first
    assert order(6) != first


def test_no_rows_and_no_epochs() -> None:
    with pytest.raises(UserError, match="no training rows"):
        local_order(0, 2, 8, 0)
    assert list(local_order(5, 0, 8, 0)) == []


def test_features_of_no_rows_is_an_error() -> None:
    bt = BTLora(tiny("bert"), AdapterSettings(r_max=2))
    with pytest.raises(UserError, match="no training rows"):
        features(bt, TASK, Encoded.from_rows([], []), STEADY, PAPER)
