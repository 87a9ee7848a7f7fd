"""BT-LoRA: the penalties, the common A, starting afresh, and trimming."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from fedp2eft.adapters.btlora import BTLora, common_A
from fedp2eft.adapters.budget import keep_largest
from fedp2eft.client.descent import adamw, descend
from fedp2eft.errors import UserError
from fedp2eft.settings.experiment import AdapterSettings, LocalSettings
from tiny import (
    TASK,
    disturb,
    double_adapter,
    random_lambda,
    tiny,
    tiny_rows,
)

IDS = torch.arange(1, 13).reshape(2, 6)
EMBEDDED = ("gpt2", ["wte", "c_attn", "c_proj"])


def make(kind: str = "bert", targets: str | list[str] = "all-linear", **more: object) -> BTLora:
    return BTLora(tiny(kind).eval(), AdapterSettings(r_max=4, target_modules=targets, **more))


def logits(bt: BTLora) -> torch.Tensor:
    with torch.no_grad():
        return bt.model(input_ids=IDS).logits


# ── the penalties ───────────────────────────────────────────────────────────────────────────────


def penalty_by_loops(bt: BTLora, B0: list[torch.Tensor], n: int, alpha_s: float, alpha_p: float):
    """The objective's two penalty terms and their gradients, one Python float at a time."""
    s = bt.settings
    significance = sparsity = 0.0
    lam_grad = torch.zeros(len(bt.names), s.r_max, dtype=torch.float64)
    B_grads = []
    for row, (B, before) in enumerate(zip(bt.B, B0, strict=True)):
        B_grad = torch.zeros(B.shape, dtype=torch.float64)
        for i in range(s.r_max):
            raw = float(bt.lam.detach()[row, 0 if s.layerwise else i])
            lam = min(max(raw, s.lambda_min), s.lambda_max)
            norm = 0.0
            for j in range(B.shape[0]):
                change = float(B.detach()[j, i]) - float(before[j, i])
                norm += abs(change)
                B_grad[j, i] = alpha_s / n / lam * (change > 0) - alpha_s / n / lam * (change < 0)
            significance += norm / lam
            sparsity += 100 * lam + math.log(lam)
            lam_grad[row, i] = alpha_s / n * -norm / lam**2 + alpha_p / n * (100 + 1 / lam)
        B_grads.append(B_grad)
    if s.layerwise:
        lam_grad = lam_grad.sum(dim=1, keepdim=True)
    return alpha_s / n * significance + alpha_p / n * sparsity, B_grads, lam_grad


@pytest.mark.parametrize("layerwise", [False, True], ids=["rank-wise", "layer-wise"])
@pytest.mark.parametrize("anchored", [False, True], ids=["from-zero", "from-B0"])
def test_penalty_and_its_gradients_equal_a_plain_loop(layerwise, anchored) -> None:
    bt = make("llama", ["q_proj", "down_proj"], layerwise=layerwise, lambda_max=1.8)
    lam = random_lambda(bt)
    lam[1, :2] = torch.tensor([-1.0, 5.0])  # outside the range on both sides
    bt.set_lambda(lam[:, :1] if layerwise else lam)
    B0 = [torch.zeros_like(B) for B in bt.B]
    if anchored:
        disturb(bt, seed=1)
        bt.anchor()
        B0 = [B.detach().clone() for B in bt.B]
    disturb(bt, seed=2)
    got = bt.penalty(37, 90.0, 0.2)
    value, B_grads, lam_grad = penalty_by_loops(bt, B0, 37, 90.0, 0.2)
    assert float(got.detach()) == pytest.approx(value, rel=1e-5)
    got.backward()
    for B, want in zip(bt.B, B_grads, strict=True):
        assert torch.allclose(B.grad.double(), want, rtol=1e-5)
    assert torch.allclose(bt.lam.grad.double(), lam_grad, rtol=1e-4)


def test_penalty_defaults_are_those_of_the_paper() -> None:
    bt = make()
    disturb(bt)
    assert torch.equal(bt.penalty(50), bt.penalty(50, 100.0, 0.01))
    assert float(bt.penalty(50)) == pytest.approx(2 * float(bt.penalty(100)), rel=1e-6)


def test_an_anchor_lasts_until_the_next_reset() -> None:
    bt = make()
    disturb(bt)
    bt.anchor()
    assert float(bt.penalty(1, alpha_p=0.0)) == 0.0
    bt.reset()
    disturb(bt)
    assert float(bt.penalty(1, alpha_p=0.0)) > 1.0


# ── the common A ────────────────────────────────────────────────────────────────────────────────


def test_two_clients_start_from_the_same_a() -> None:
    torch.manual_seed(1)
    one = make()
    torch.manual_seed(2)
    two = make()
    assert all(torch.equal(a, b) for a, b in zip(one.A, two.A, strict=True))


def test_another_process_draws_the_same_a() -> None:
    code = (
        "import torch; from fedp2eft.adapters.btlora import common_A;"
        "print(common_A('encoder.layer.0', torch.empty(4, 16), 5).double().tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    mine = common_A("encoder.layer.0", torch.empty(4, 16), 5)
    assert done.stdout.strip() == str(mine.double().tolist())


def test_common_a_depends_on_name_and_seed_alone() -> None:
    like = torch.empty(4, 16)
    torch.manual_seed(1)
    first = common_A("a", like, 0)
    torch.manual_seed(2)
    assert torch.equal(common_A("a", torch.ones(4, 16), 0), first)
    assert not torch.equal(common_A("b", like, 0), first)
    assert not torch.equal(common_A("a", like, 1), first)


def test_a_layer_has_the_same_a_whichever_other_layers_are_adapted() -> None:
    few, all_ = make("bert", ["query"]), make("bert")
    assert torch.equal(few.A[1], all_.A[all_.names.index(few.names[1])])


def test_common_a_fills_the_kaiming_range() -> None:
    A = common_A("a", torch.empty(64, 100), 0)
    bound = 1 / math.sqrt(100)  # √(6 / ((1 + a²)·d_in)) with a = √5
    assert 0.99 * bound < float(A.abs().max()) <= bound
    assert float(A.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_a_given_common_a_is_used_after_every_reset() -> None:
    bt = make("bert", ["query"])
    given = {name: torch.full((4, 16), float(i + 1)) for i, name in enumerate(bt.names)}
    bt.set_common_A(given)
    disturb(bt)
    bt.reset()
    assert [float(A.mean()) for A in bt.A] == [1.0, 2.0]
    with pytest.raises(UserError, match=bt.names[1]):
        bt.set_common_A({bt.names[0]: given[bt.names[0]]})


# ── construction and starting afresh ────────────────────────────────────────────────────────────


def test_a_fresh_adapter_leaves_the_logits_and_the_base_weights_alone() -> None:
    plain = tiny("bert").eval()
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    with torch.no_grad():
        want = plain(input_ids=IDS).logits
    bt = BTLora(plain, AdapterSettings(r_max=4))
    assert torch.equal(logits(bt), want)
    kept = {k.replace(".base_layer", ""): v for k, v in plain.state_dict().items()}
    assert all(torch.equal(kept[name], value) for name, value in before.items())


def test_only_a_b_and_lambda_are_trained() -> None:
    bt = make()
    trained = {id(p) for p in bt.model.parameters() if p.requires_grad}
    assert trained == {id(p) for p in (*bt.A, *bt.B, bt.lam)}


@pytest.mark.parametrize("training", [True, False])
def test_wrapping_keeps_the_mode_of_the_base(training) -> None:
    bt = BTLora(tiny("bert").train(training), AdapterSettings(r_max=4))
    assert {module.training for module in bt.model.modules()} == {training}


def test_all_linear_takes_pooler_and_head_of_a_classifier_but_no_output_head() -> None:
    assert {"bert.pooler.dense", "classifier"} <= set(make("bert").names)
    assert "lm_head" not in make("llama").names
    assert len(make("llama").names) == 14


def test_the_scale_is_alpha_over_r_and_stays_two_after_trimming() -> None:
    bt = make()
    scales = {scale for layer in bt.layers for scale in layer.module.scaling.values()}
    keep = keep_largest(random_lambda(bt), 2)
    assert len(set(keep.sum(dim=1).tolist())) > 2
    with bt.trimmed(random_lambda(bt), keep) as trimmed:
        scales |= {scale for layer in bt.layers for scale in layer.module.scaling.values()}
        assert trimmed.weights().scaling == 2.0
    assert scales == {2.0}


def test_construction_and_trimming_leave_the_global_random_state_alone() -> None:
    model = tiny("bert")
    before = torch.get_rng_state()
    bt = BTLora(model, AdapterSettings(r_max=4))
    with bt.trimmed(random_lambda(bt), keep_largest(random_lambda(bt), 1)):
        pass
    bt.reset()
    assert torch.equal(torch.get_rng_state(), before)


def test_reset_brings_back_every_number_and_drops_every_gradient() -> None:
    bt = make()
    first = [p.detach().clone() for p in (*bt.A, *bt.B)]
    disturb(bt)
    bt.set_lambda(random_lambda(bt, seed=1))
    (bt.model(input_ids=IDS).logits.square().sum() + bt.penalty(10)).backward()
    torch.optim.SGD([*bt.A, *bt.B, bt.lam], lr=0.1).step()
    assert not torch.equal(bt.A[0], first[0])
    lam = random_lambda(bt, seed=2)
    bt.reset(lam)
    assert all(torch.equal(p, q) for p, q in zip((*bt.A, *bt.B), first, strict=True))
    assert torch.equal(bt.lam, lam)
    assert all(p.grad is None for p in (*bt.A, *bt.B, bt.lam))
    bt.reset()
    assert torch.equal(bt.lam, torch.full_like(lam, 1e-4))


def test_rank_lambda_is_clamped_and_wide_whatever_lambda_is() -> None:
    bt = make("bert", ["query"], layerwise=True)
    bt.set_lambda(torch.tensor([[-1.0], [0.5]]))
    assert torch.equal(bt.rank_lambda(), torch.tensor([[1e-4] * 4, [0.5] * 4]))


def test_a_module_that_the_model_lacks_is_an_error_that_names_it() -> None:
    with pytest.raises(UserError, match=r"no_such_layer.*target_modules"):
        make("bert", ["no_such_layer"])


# ── trimming ────────────────────────────────────────────────────────────────────────────────────


def state(bt: BTLora) -> dict[str, object]:
    return {
        "names": [name for name, _ in bt.model.named_parameters()],
        "keys": list(bt.model.state_dict()),
        "flags": [p.requires_grad for p in bt.model.parameters()],
        "numbers": [p.detach().clone() for p in bt.model.parameters()],
        "logits": logits(bt),
    }


@pytest.mark.parametrize(("kind", "targets"), [("bert", "all-linear"), EMBEDDED])
def test_after_trimming_the_model_is_as_before(kind, targets) -> None:
    bt = make(kind, targets)
    disturb(bt)
    bt.set_lambda(random_lambda(bt))
    before = state(bt)
    for round_ in range(2):  # the second one meets what the first left behind
        keep = keep_largest(random_lambda(bt, seed=round_), 2)
        keep[0] = True
        with bt.trimmed(random_lambda(bt), keep) as trimmed:
            with torch.no_grad():
                for parameter in trimmed.parameters():
                    parameter.add_(0.3)
            assert not torch.allclose(logits(bt), before["logits"])
    after = state(bt)
    assert torch.equal(after.pop("logits"), before["logits"])
    numbers = zip(after.pop("numbers"), before["numbers"], strict=True)
    assert all(torch.equal(p, q) for p, q in numbers)
    assert after == {key: before[key] for key in after}


def test_a_failure_inside_gives_the_model_back() -> None:
    bt = make()
    disturb(bt)
    want = logits(bt)
    keep = keep_largest(random_lambda(bt), 1)
    with pytest.raises(RuntimeError, match="boom"), bt.trimmed(random_lambda(bt), keep):
        raise RuntimeError("boom")
    assert torch.equal(logits(bt), want)
    with bt.trimmed(random_lambda(bt), keep):
        pass


def test_trimming_warns_of_nothing(recwarn) -> None:
    bt = make()
    recwarn.clear()
    with bt.trimmed(random_lambda(bt), keep_largest(random_lambda(bt), 1)):
        pass
    assert [str(w.message) for w in recwarn if w.category is UserWarning] == []


def test_a_trimmed_adapter_starts_from_the_kept_rows_of_the_common_a() -> None:
    bt = make()
    rows = [A.detach().clone() for A in bt.A]
    disturb(bt)
    keep = keep_largest(random_lambda(bt), 2)
    lam = random_lambda(bt)
    with bt.trimmed(lam, keep) as trimmed:
        weights = trimmed.weights()
        assert {p.requires_grad for p in trimmed.parameters()} == {True}
        trained = {id(p) for p in bt.model.parameters() if p.requires_grad}
        assert trained == {id(p) for p in trimmed.parameters()}
    for row, layer in enumerate(weights.layers):
        assert torch.equal(layer.A, rows[row][keep[row]])
        assert torch.equal(layer.B, torch.zeros(bt.B[row].shape[0], int(keep[row].sum())))
        assert torch.equal(layer.lam, lam[row][keep[row]])
    assert torch.equal(trimmed.lam, torch.where(keep, lam, torch.tensor(0.0)))
    assert weights.ranks == dict(zip(bt.names, keep.sum(dim=1).tolist(), strict=True))


def only_one_layer(keep: torch.Tensor) -> torch.Tensor:
    keep = torch.zeros_like(keep)
    keep[3, :2] = True
    return keep


def one_layer_without(keep: torch.Tensor) -> torch.Tensor:
    keep = keep.clone()
    keep[2] = False
    return keep


@pytest.mark.parametrize("shape", [only_one_layer, one_layer_without, lambda keep: keep])
def test_training_trimmed_equals_training_whole_with_the_dropped_lambda_zero(shape) -> None:
    """Dropping a rank loses nothing: it is the same as λ = 0 there."""
    data = tiny_rows([5, 3, 7, 4])
    order = [np.array([0, 1]), np.array([2, 3]), np.array([1, 3])]

    def train(bt: BTLora, parameters: list[nn.Parameter]) -> list[float]:
        def loss_of(rows):
            return TASK.loss(bt.model, TASK.batch(data, rows))

        optimizer = adamw([{"params": parameters, "lr": 1e-2}])
        settings = LocalSettings(dropout=False)
        return descend(bt.model, loss_of, order, optimizer, parameters, settings)

    cut = double_adapter()
    lam = random_lambda(cut)
    keep = shape(keep_largest(lam, 2))
    with cut.trimmed(lam, keep) as trimmed:
        losses = train(cut, trimmed.parameters())
        weights, got = trimmed.weights(), TASK.logits(cut.model, data, 4)

    whole = BTLora(tiny("bert", dropout=0.0).double(), cut.settings, clamp_forward=False)
    whole.reset(lam * keep)
    whole.lam.requires_grad_(False)
    assert train(whole, whole.A + whole.B) == pytest.approx(losses, abs=1e-6)
    assert (got - TASK.logits(whole.model, data, 4)).abs().max() < 1e-6
    for row, layer in enumerate(weights.layers):
        assert torch.allclose(layer.A, whole.A[row].detach()[keep[row]], atol=1e-6, rtol=0)
        assert torch.allclose(layer.B, whole.B[row].detach()[:, keep[row]], atol=1e-6, rtol=0)
    assert max(float(layer.B.abs().max()) for layer in weights.layers if layer.rank) > 1e-3


class Nested(nn.Module):
    """One layer's name ends another's."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(4, 4)
        self.output = nn.ModuleDict({"dense": nn.Linear(4, 4)})

    def forward(self, x):
        return self.output["dense"](self.dense(x))


def test_a_name_that_ends_another_keeps_its_own_rank() -> None:
    bt = BTLora(Nested(), AdapterSettings(r_max=4, target_modules=["dense"]))
    assert bt.names == ("dense", "output.dense")
    keep = torch.tensor([[True, False, False, False], [True, True, True, False]])
    with bt.trimmed(torch.ones(2, 4), keep) as trimmed:
        assert trimmed.weights().ranks == {"dense": 1, "output.dense": 3}
    keep[1] = False
    with bt.trimmed(torch.ones(2, 4), keep) as trimmed:
        assert len(trimmed.parameters()) == 2


def test_keeping_no_rank_at_all_is_an_error() -> None:
    bt = make()
    with (
        pytest.raises(UserError, match="No rank is kept"),
        bt.trimmed(random_lambda(bt), torch.zeros(len(bt.names), 4, dtype=torch.bool)),
    ):
        pass


def test_trim_cuts_the_trained_adapter_to_its_largest_lambda() -> None:
    bt = make()
    disturb(bt)
    bt.set_lambda(random_lambda(bt))
    keep = keep_largest(bt.lam.detach(), 2)
    weights = bt.trim(2)
    assert weights.ranks == dict(zip(bt.names, keep.sum(dim=1).tolist(), strict=True))
    for row, layer in enumerate(weights.layers):
        want = bt.B[row] @ torch.diag(bt.lam[row] * keep[row]) @ bt.A[row]
        assert torch.allclose(layer.B @ torch.diag(layer.lam) @ layer.A, want, atol=1e-6)
    assert weights.scaling == 2.0


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_off_is_the_base_alone_and_ends_with_the_adapter_as_it_was(kind: str) -> None:
    bt = double_adapter(kind)
    bt.reset(0.5)
    disturb(bt)
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        on = bt.model(input_ids=ids).logits
        with bt.model.disable_adapter():
            want = bt.model(input_ids=ids).logits
        with bt.off():
            assert torch.equal(bt.model(input_ids=ids).logits, want)
        assert torch.equal(bt.model(input_ids=ids).logits, on)
    assert not torch.equal(on, want)
    assert all(value.requires_grad for value in (*bt.A, *bt.B, bt.lam))
