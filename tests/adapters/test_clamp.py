"""The clamp: exact values, gradients of the identity."""

from __future__ import annotations

import pytest
import torch

from fedp2eft.adapters.gates import clamp_straight_through

LOW, HIGH = 1e-4, 1000.0
BELOW = [-3.0, 0.0, 5e-5]
INSIDE = [LOW, 1.1e-4, 0.1 + 0.2, 1.0, 123.456, HIGH]
ABOVE = [1000.001, 1e30]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_inside_and_at_the_ends_keep_every_bit(dtype) -> None:
    x = torch.tensor(INSIDE, dtype=dtype)
    assert torch.equal(clamp_straight_through(x, LOW, HIGH), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_outside_become_exactly_the_ends(dtype) -> None:
    x = torch.tensor(BELOW + ABOVE, dtype=dtype)
    want = torch.tensor([LOW] * len(BELOW) + [HIGH] * len(ABOVE), dtype=dtype)
    assert torch.equal(clamp_straight_through(x, LOW, HIGH), want)


def test_gradient_passes_unchanged_inside_at_and_outside_the_range() -> None:
    x = torch.tensor(BELOW + INSIDE + ABOVE, requires_grad=True)
    upstream = torch.linspace(-2, 5, len(x))
    clamp_straight_through(x, LOW, HIGH).backward(upstream)
    assert torch.equal(x.grad, upstream)


def test_later_operations_see_the_clamped_value() -> None:
    x = torch.tensor([-1.0, 0.5, 2000.0], requires_grad=True)
    clamp_straight_through(x, LOW, HIGH).log().sum().backward()
    assert torch.allclose(x.grad, torch.tensor([1 / LOW, 2.0, 1 / HIGH]))


def test_nan_stays_nan() -> None:
    assert clamp_straight_through(torch.tensor([torch.nan]), LOW, HIGH).isnan().all()
