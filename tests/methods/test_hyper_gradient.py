"""The implicit hyper-gradient against closed forms and against central finite differences.

All in float64. Tolerances: 1e-10 relative where the two are equal in exact arithmetic, 1e-6 for a
finite difference of the same quantity, 2 % where the series leaves out what H changes on the way.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedp2eft.adapters.btlora import BTLora
from fedp2eft.client.descent import adamw, rate_groups
from fedp2eft.methods.fedl2p.hyper_gradient import hyper_gradient
from fedp2eft.methods.fedl2p.meta_net import MetaNet
from fedp2eft.methods.fedl2p.method import last_direction
from fedp2eft.methods.lora import uniform
from fedp2eft.tasks.encoded import Encoded
from tiny import TASK, double_adapter, tiny_rows

TRAIN, HELD = tiny_rows([4, 9, 6, 7, 5, 8], seed=1), tiny_rows([6, 5, 9, 7], seed=2)


class Quadratic:
    """L_T = ½(θ−b)ᵀH(θ−b) + ½ Σ exp(η_i)·θ_i², L_V = ½|θ−c|²; θ in two tensors."""

    def __init__(self, seed: int, size: int = 5) -> None:
        generator = torch.Generator().manual_seed(seed)
        root = torch.randn(size, size, generator=generator, dtype=torch.float64)
        self.H = root @ root.T / size
        self.b, self.c, start = torch.randn(3, size, generator=generator, dtype=torch.float64)
        self.eta = (0.3 * start).requires_grad_()

    def inner(self, theta: Tensor) -> Tensor:
        away = theta - self.b
        return 0.5 * away @ self.H @ away + 0.5 * (self.eta.exp() * theta**2).sum()

    @property
    def curvature(self) -> Tensor:
        return self.H + self.eta.detach().exp().diag()

    def solution(self) -> Tensor:
        return torch.linalg.solve(self.curvature, self.H @ self.b)

    def found(self, lr: float, terms: int) -> Tensor:
        halves = [half.requires_grad_() for half in self.solution().split((2, 3))]
        outer = (torch.cat(halves).detach() - self.c).split((2, 3))
        loss = self.inner(torch.cat(halves))
        [gradient] = hyper_gradient(outer, loss, halves, [self.eta], lr=lr, terms=terms)
        return gradient

    def largest(self) -> float:
        return float(torch.linalg.eigvalsh(self.curvature).max())


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_many_terms_give_the_closed_form(seed: int) -> None:
    q = Quadratic(seed)
    theta = q.solution()
    exact = -torch.linalg.solve(q.curvature, theta - q.c) * q.eta.detach().exp() * theta
    lr = 1 / q.largest()
    errors = [float((q.found(lr, terms) - exact).norm()) for terms in (3, 10, 100)]
    assert errors[0] > errors[1] > errors[2]
    assert torch.allclose(q.found(lr, 250), exact, rtol=1e-8, atol=1e-10)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), lr=st.floats(1e-3, 0.3))
def test_three_terms_are_the_series_written_out(seed: int, lr: float) -> None:
    q = Quadratic(seed)
    theta, shrink = q.solution(), torch.eye(5, dtype=torch.float64) - lr * q.curvature
    v = theta - q.c
    series = v + shrink @ v + shrink @ shrink @ v
    wanted = -lr * series * q.eta.detach().exp() * theta
    assert torch.allclose(q.found(lr, 3), wanted, rtol=1e-10, atol=1e-14)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), terms=st.integers(1, 6))
def test_k_terms_are_the_derivative_of_k_steps_that_each_add_one(seed: int, terms: int) -> None:
    q, lr = Quadratic(seed), 0.2
    u = torch.linspace(-1, 1, 5, dtype=torch.float64)
    rate = torch.tensor([0.7, 1.3, 0.2, 0.9, 0.4], dtype=torch.float64, requires_grad=True)

    def after(rates: Tensor) -> Tensor:
        theta = torch.ones(5, dtype=torch.float64)
        for _ in range(terms):
            theta = theta - lr * (q.curvature @ theta - q.H @ q.b) - rates**2 * u
        return theta

    [exact] = torch.autograd.grad(0.5 * ((after(rate) - q.c) ** 2).sum(), rate)
    theta = after(rate).detach().requires_grad_()
    [gradient] = hyper_gradient(
        [theta.detach() - q.c], q.inner(theta), [theta], [rate], lr=lr, terms=terms,
        step=[-(rate**2) * u],
    )  # fmt: skip
    assert torch.allclose(gradient, exact, rtol=1e-10, atol=1e-13)


def test_what_depends_on_nothing_gets_zeros() -> None:
    theta = torch.ones(2, dtype=torch.float64, requires_grad=True)
    idle = torch.ones(3, dtype=torch.float64, requires_grad=True)
    other = torch.ones(1, dtype=torch.float64, requires_grad=True)
    found = hyper_gradient(
        [torch.ones(2), torch.ones(1)], (theta**4).sum(), [theta, other], [idle], lr=0.1, terms=3,
        step=[-theta.detach() * theta, -other],
    )  # fmt: skip
    assert [gradient.tolist() for gradient in found] == [[0.0, 0.0, 0.0]]


# ── a tiny BERT with LoRA ───────────────────────────────────────────────────────────────────────


def inner_weights(bt: BTLora) -> list[torch.nn.Parameter]:
    """A and B of the whole gated adapter, B disturbed so that H has all of its blocks."""
    bt.reset(1.0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for B in bt.B:
            B.add_(0.3 * torch.randn(B.shape, generator=generator, dtype=B.dtype))
    return [weight for pair in zip(bt.A, bt.B, strict=True) for weight in pair]


def loss_on(bt: BTLora, rows: Encoded) -> Tensor:
    """Mean cross-entropy in float64 (the task's own rounds it to float32)."""
    batch = TASK.batch(rows, range(len(rows)))
    labels = batch.pop("labels")
    return cross_entropy(bt.model(**batch).logits, labels)


@torch.no_grad()
def put(weights: list[torch.nn.Parameter], values: list[Tensor]) -> None:
    for weight, value in zip(weights, values, strict=True):
        weight.copy_(value)


def central(value_at: Callable[[float], float], step: float) -> float:
    return (value_at(step) - value_at(-step)) / (2 * step)


@pytest.fixture
def bert() -> BTLora:
    bt = double_adapter()
    bt.model.eval()
    bt.model.get_base_model().set_attn_implementation("eager")
    return bt


def test_a_converged_tiny_model(bert: BTLora) -> None:
    """η_m pulls matrix m to where it started; the outer loss at the inner minimum, to 1e-6."""
    weights = inner_weights(bert)
    start = [weight.detach().clone() for weight in weights]
    eta = torch.linspace(2, 3, len(weights), dtype=torch.float64).requires_grad_()

    def inner(pull: Tensor) -> Tensor:
        terms = [
            0.5 * strength * ((weight - anchor) ** 2).sum()
            for strength, weight, anchor in zip(pull.exp(), weights, start, strict=True)
        ]
        return loss_on(bert, TRAIN) + torch.stack(terms).sum()

    def converge(pull: Tensor) -> None:
        put(weights, start)
        for _ in range(60):
            slope = torch.autograd.grad(inner(pull), weights)
            put(weights, [w - 0.05 * g for w, g in zip(weights, slope, strict=True)])
        assert max(float(g.abs().max()) for g in slope) < 1e-9

    direction = torch.randn(len(weights), generator=torch.Generator().manual_seed(4)).double()

    def value_at(step: float) -> float:
        converge(eta.detach() + step * direction)
        return loss_on(bert, HELD).item()

    wanted = central(value_at, 1e-3)
    converge(eta.detach())
    outer = torch.autograd.grad(loss_on(bert, HELD), weights)
    [gradient] = hyper_gradient(outer, inner(eta), weights, [eta], lr=0.05, terms=60)
    assert float(gradient @ direction) == pytest.approx(wanted, rel=1e-6)
    [short] = hyper_gradient(outer, inner(eta), weights, [eta], lr=0.05, terms=3)
    assert 1e-3 < abs(float(short @ direction) / wanted - 1) < 0.3  # three terms only come near


@pytest.mark.parametrize("terms", [1, 3])
def test_the_last_steps_of_gradient_descent(bert: BTLora, terms: int) -> None:
    """`terms` unrolled steps θ ← θ − rate_m·∂L_T/∂θ of a tiny model, to 2 %."""
    weights, lr = inner_weights(bert), 2e-4
    start = [weight.detach().clone() for weight in weights]
    rates = torch.full((len(weights),), lr, dtype=torch.float64)
    direction = torch.randn(len(weights), generator=torch.Generator().manual_seed(5)).double()

    def run(step: float) -> list[Tensor]:
        put(weights, start)
        for _ in range(terms):
            slope = torch.autograd.grad(loss_on(bert, TRAIN), weights)
            moved = zip(weights, slope, rates + step * direction, strict=True)
            put(weights, [w - rate * g for w, g, rate in moved])
        return list(slope)

    def value_at(step: float) -> float:
        run(step)
        return loss_on(bert, HELD).item()

    wanted = central(value_at, 1e-6)
    slope = run(0.0)
    eta = rates.clone().requires_grad_()
    outer = torch.autograd.grad(loss_on(bert, HELD), weights)
    [gradient] = hyper_gradient(
        outer, loss_on(bert, TRAIN), weights, [eta], lr=lr, terms=terms,
        step=[-rate * g for rate, g in zip(eta, slope, strict=True)],
    )  # fmt: skip
    assert float(gradient @ direction) == pytest.approx(wanted, rel=0.02 if terms > 1 else 1e-6)


def test_adamws_last_step_through_the_meta_net(bert: BTLora) -> None:
    """One term is the derivative with respect to the rates of AdamW's last step, to 1e-6."""
    net = MetaNet(6, 5, 2 * len(bert.names), init_lr=1e-2).double()
    xi = torch.linspace(-1, 1, 6, dtype=torch.float64)
    hyper = list(net.parameters())
    generator = torch.Generator().manual_seed(6)
    directions = [torch.randn(p.shape, generator=generator).double() for p in hyper]
    # the learnable rates are a hundred times smaller than the other numbers
    directions = [0.01 * d if p is net.lr else d for d, p in zip(directions, hyper, strict=True)]
    first = [p.detach().clone() for p in hyper]

    with bert.trimmed(*uniform(bert, 2)) as adapter:
        weights = adapter.parameters()
        start = [weight.detach().clone() for weight in weights]

        def run(step: float) -> torch.optim.Optimizer:
            put(hyper, first)
            put(weights, start)
            optimizer = adamw(rate_groups(weights, net(xi)))
            for number in range(3):
                if number == 2:
                    put(hyper, [p + step * d for p, d in zip(first, directions, strict=True)])
                    groups = optimizer.param_groups
                    for group, rate in zip(groups, net(xi).flatten().tolist(), strict=True):
                        group["lr"] = rate
                optimizer.zero_grad()
                loss_on(bert, TRAIN).backward()
                optimizer.step()
            return optimizer

        def value_at(step: float) -> float:
            run(step)
            return loss_on(bert, HELD).item()

        wanted = central(value_at, 1e-4)
        u = last_direction(run(0.0))
        put(hyper, first)
        outer = torch.autograd.grad(loss_on(bert, HELD), weights)
        moved = [-rate * way for rate, way in zip(net(xi).flatten(), u, strict=True)]
        found = hyper_gradient(
            outer, loss_on(bert, TRAIN), weights, hyper, lr=0.1, terms=1, step=moved
        )
        slope = sum(float((g * d).sum()) for g, d in zip(found, directions, strict=True))
    assert abs(wanted) > 1e-4
    assert slope == pytest.approx(wanted, rel=1e-6)


def test_what_adamw_did_last(bert: BTLora) -> None:
    weights = inner_weights(bert)
    rates = torch.linspace(1e-3, 1e-2, len(weights), dtype=torch.float64)
    optimizer = adamw(rate_groups(weights, rates))
    assert not any(bool(u.any()) for u in last_direction(optimizer))
    for _ in range(3):
        before = [weight.detach().clone() for weight in weights]
        optimizer.zero_grad()
        loss_on(bert, TRAIN).backward()
        optimizer.step()
    for was, weight, rate, u in zip(before, weights, rates, last_direction(optimizer), strict=True):
        assert torch.allclose(was - rate * u, weight, rtol=0, atol=1e-12)
