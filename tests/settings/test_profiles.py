"""`paper` and `reference` differ in what METHOD lists, one flag each, and in nothing else."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from fedp2eft.adapters.btlora import BTLora
from fedp2eft.client.training import features, stage1, train_round
from fedp2eft.settings.experiment import AdapterSettings, GeneratorSettings, LocalSettings
from fedp2eft.settings.profiles import PAPER, PROFILES, REFERENCE, Profile
from tiny import LONGEST, TASK, disturb, random_lambda, tiny, tiny_psg, tiny_rows

DATA = tiny_rows([5, 3, 7, 4, 6, 2])
LOCAL = LocalSettings(dropout=False)
ONE_STEP, THREE_STEPS = [np.arange(6)], [np.arange(6)] * 3
FLAGS = ["clamp_forward", "clamp_target", "zero_lambda_grad", "masked_features"]


def adapter(profile: Profile, **settings: float) -> BTLora:
    model = tiny("bert", dropout=0.0).eval()
    return BTLora(model, AdapterSettings(r_max=2, **settings), clamp_forward=profile.clamp_forward)


def run_stage1(profile: Profile, order: list[np.ndarray], **settings: float) -> list[Tensor]:
    """Losses, A, B and λ after stage 1 from λ between 0.4 and 0.6."""
    bt = adapter(profile, **settings)
    bt.reset(random_lambda(bt, low=0.4, high=0.6))
    losses = stage1(bt, TASK, DATA, order, LOCAL, profile)
    return [torch.tensor(losses), *(p.detach().clone() for p in (*bt.A, *bt.B, bt.lam))]


def run_round(profile: Profile, order: list[np.ndarray], **settings: float):
    bt = adapter(profile, **settings)
    generator = GeneratorSettings(init_lambda=0.5)
    psg = tiny_psg(bt, generator)
    xi = features(bt, TASK, DATA, LOCAL, PAPER)
    return train_round(bt, TASK, DATA, xi, psg, order, LOCAL, generator, profile)


def same(one: list[Tensor], two: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def flip(flag: str) -> Profile:
    return replace(PAPER, **{flag: getattr(REFERENCE, flag)})


def test_the_profiles_are_these_two_and_differ_in_every_flag() -> None:
    assert {"paper": PAPER, "reference": REFERENCE} == PROFILES
    for field in fields(Profile):
        assert getattr(PAPER, field.name) != getattr(REFERENCE, field.name), field.name
    assert (PAPER.feature_kind, REFERENCE.feature_kind) == ("masked", "padded")
    assert REFERENCE.feature_batch_size == 4


# ── nothing else differs ────────────────────────────────────────────────────────────────────────


def test_one_step_inside_the_range_is_the_same_to_the_last_bit() -> None:
    assert same(run_stage1(PAPER, ONE_STEP), run_stage1(REFERENCE, ONE_STEP))


def test_a_round_of_one_step_inside_the_range_is_the_same_to_the_last_bit() -> None:
    one, two = run_round(PAPER, ONE_STEP), run_round(REFERENCE, ONE_STEP)
    assert torch.equal(one.lam, two.lam)
    assert one.psg_loss == two.psg_loss
    assert same(list(one.phi.values()), list(two.phi.values()))


def test_features_of_rows_without_padding_are_the_same() -> None:
    full = tiny_rows([LONGEST] * 5)
    bt = adapter(PAPER)
    one, two = (features(bt, TASK, full, LOCAL, profile) for profile in (PAPER, REFERENCE))
    assert torch.allclose(one, two, atol=1e-6)


@pytest.mark.parametrize("flag", ["clamp_forward", "clamp_target", "masked_features"])
def test_flags_other_than_zeroing_change_no_step_inside_the_range(flag) -> None:
    assert same(run_stage1(PAPER, THREE_STEPS), run_stage1(flip(flag), THREE_STEPS))


# ── each difference alone ───────────────────────────────────────────────────────────────────────


def test_forward_sees_lambda_raw_but_the_penalties_clamped() -> None:
    batch = TASK.batch(DATA, [0, 1])
    batch.pop("labels")

    def logits_and_penalty(profile: Profile, lam: float) -> tuple[Tensor, Tensor]:
        bt = adapter(profile)
        disturb(bt)
        bt.set_lambda(lam)
        with torch.no_grad():
            return bt.model(**batch).logits, bt.penalty(10)

    raw = flip("clamp_forward")
    for lam, clamped in ((-0.5, 1e-4), (5000.0, 1000.0)):
        paper, reference = logits_and_penalty(PAPER, lam), logits_and_penalty(raw, lam)
        assert not torch.allclose(paper[0], reference[0])
        assert torch.equal(paper[1], reference[1])
        assert torch.equal(paper[0], logits_and_penalty(PAPER, clamped)[0])
        assert torch.equal(paper[1], logits_and_penalty(PAPER, clamped)[1])
    assert torch.equal(logits_and_penalty(PAPER, 0.5)[0], logits_and_penalty(raw, 0.5)[0])


def test_stage2_regresses_on_lambda_clamped_or_raw() -> None:
    limits = {"lambda_min": 0.498, "lambda_max": 0.502}  # one step of λ is 0.01: outside
    paper, raw = (run_round(p, ONE_STEP, **limits) for p in (PAPER, flip("clamp_target")))
    assert paper.stage1_losses == raw.stage1_losses
    assert torch.equal(paper.lam, raw.lam)
    assert (paper.lam == torch.tensor(0.498)).any() or (paper.lam == torch.tensor(0.502)).any()
    # λ̂ = 0.5 is 0.002 away from the end of the range, and 0.01 from λ^s itself.
    assert paper.psg_loss == pytest.approx(0.002 * paper.lam.numel(), rel=0.3)
    assert raw.psg_loss == pytest.approx(0.01 * paper.lam.numel(), rel=0.3)


def test_gradients_of_lambda_add_up_over_a_local_run_and_those_of_a_and_b_do_not() -> None:
    adding = flip("zero_lambda_grad")
    sums: dict[str, list[Tensor]] = {}
    for profile in (PAPER, adding):
        bt = adapter(profile)
        bt.reset(random_lambda(bt, low=0.4, high=0.6))
        still = LocalSettings(dropout=False, lr=1e-30, lambda_lr=1e-30, max_grad_norm=1e9)
        kept: list[Tensor] = []
        stage1(
            bt, TASK, DATA, THREE_STEPS, still, profile,
            on_step=lambda loss, bt=bt, kept=kept: kept.append(bt.lam.grad.clone()),
        )  # fmt: skip
        sums[profile.name + str(profile.zero_lambda_grad)] = kept
        sums.setdefault("B", []).append(bt.B[0].grad.clone())
    zeroed, added = sums["paperTrue"], sums["paperFalse"]
    assert torch.allclose(added[2], zeroed[0] + zeroed[1] + zeroed[2])
    assert torch.allclose(zeroed[0], zeroed[2])
    assert zeroed[0].abs().min() > 0
    assert torch.allclose(*sums["B"])
    assert not same(run_stage1(PAPER, THREE_STEPS)[-1:], run_stage1(adding, THREE_STEPS)[-1:])


def test_a_new_local_run_starts_with_no_gradient_of_lambda() -> None:
    bt = adapter(REFERENCE)
    lam = random_lambda(bt, low=0.4, high=0.6)
    runs = []
    for _ in range(2):
        bt.reset(lam)
        stage1(bt, TASK, DATA, THREE_STEPS, LOCAL, REFERENCE)
        runs.append(bt.lam.detach().clone())
    assert torch.equal(*runs)


def test_features_average_over_padding_or_leave_it_out() -> None:
    bt = adapter(PAPER)
    masked = features(bt, TASK, DATA, LOCAL, PAPER)
    padded = features(bt, TASK, DATA, LOCAL, flip("masked_features"))
    assert (masked - padded).abs().max() > 1e-3
    full = tiny_rows([6] * 5)  # as long as each other: their own batches need no padding
    one, two = (features(bt, TASK, full, LOCAL, p) for p in (PAPER, flip("masked_features")))
    assert torch.allclose(one, two, atol=1e-6)


def test_features_come_from_large_batches_of_their_own_length_or_fours_of_the_longest() -> None:
    def shapes(profile: Profile) -> list[tuple[int, ...]]:
        bt, seen = adapter(profile), []
        handle = bt.model.register_forward_pre_hook(
            lambda _m, _a, inputs: seen.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
        )
        features(bt, TASK, DATA, LOCAL, profile)
        handle.remove()
        return seen

    assert shapes(PAPER) == [(6, 7)]
    assert shapes(flip("feature_batch_size")) == [(4, LONGEST), (2, LONGEST)]


@pytest.mark.parametrize("profile", [PAPER, REFERENCE], ids=lambda p: p.name)
def test_neither_profile_clips_lambda(profile) -> None:
    gradients = []
    for bound in (1e9, 1e-3):
        bt = adapter(profile)
        bt.reset(random_lambda(bt))
        local = LocalSettings(dropout=False, max_grad_norm=bound)
        stage1(bt, TASK, DATA, ONE_STEP, local, profile)
        norm = torch.cat([p.grad.reshape(-1) for p in (*bt.A, *bt.B)]).norm()
        gradients.append((bt.lam.grad.clone(), float(norm)))
    assert torch.equal(gradients[0][0], gradients[1][0])
    assert gradients[0][1] > 2e-3
    assert gradients[1][1] == pytest.approx(1e-3, rel=1e-2)
