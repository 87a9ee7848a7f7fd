"""A budget keeps the largest λ: r·L ranks, or as many as the parameters of r·L ranks pay for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedp2eft.adapters.budget import keep_largest
from fedp2eft.errors import UserError

FLOATS = st.floats(0.0, 1000.0, width=32)
TIES = st.sampled_from([1e-4, 0.5, 1000.0])


@st.composite
def budgets(draw, values=FLOATS) -> tuple[Tensor, int]:
    """(λ, r): any shape, with many ties where `values` is a small range."""
    layers, r_max = draw(st.integers(1, 6)), draw(st.integers(1, 8))
    numbers = draw(st.lists(values, min_size=layers * r_max, max_size=layers * r_max))
    lam = torch.tensor(numbers, dtype=torch.float32).reshape(layers, r_max)
    return lam, draw(st.integers(1, r_max))


@given(budgets())
@settings(deadline=None)
def test_exactly_r_times_l_ranks_are_kept_and_none_dropped_is_larger(case) -> None:
    lam, rank = case
    keep = keep_largest(lam, rank)
    assert keep.shape == lam.shape
    assert keep.dtype == torch.bool
    assert int(keep.sum()) == rank * lam.shape[0]
    if not keep.all():
        assert lam[keep].min() >= lam[~keep].max()


@given(budgets(values=TIES))
@settings(deadline=None)
def test_ties_go_to_the_earlier_layer_and_rank(case) -> None:
    lam, rank = case
    flat = lam.reshape(-1).tolist()
    order = sorted(range(len(flat)), key=lambda i: (-flat[i], i))
    want = np.zeros(len(flat), bool)
    want[order[: rank * lam.shape[0]]] = True
    assert keep_largest(lam, rank).reshape(-1).tolist() == want.tolist()


@given(budgets(values=TIES))
@settings(deadline=None)
def test_a_larger_budget_keeps_all_that_a_smaller_one_keeps(case) -> None:
    lam, rank = case
    if rank > 1:
        assert keep_largest(lam, rank)[keep_largest(lam, rank - 1)].all()


@st.composite
def costs_of(draw, budget) -> tuple[Tensor, int, list[int]]:
    """(λ, r) with the parameters of a rank of each layer."""
    lam, rank = draw(budget)
    layers = len(lam)
    return lam, rank, draw(st.lists(st.integers(1, 9), min_size=layers, max_size=layers))


def spent(keep: Tensor, costs: list[int]) -> int:
    return int((keep.sum(dim=1) * torch.tensor(costs)).sum())


@given(costs_of(budgets(values=TIES)))
@settings(deadline=None)
def test_parameters_are_spent_in_the_order_of_lambda(case) -> None:
    """Each rank in turn is kept if it fits: the next ones are tried, narrower or not."""
    lam, rank, costs = case
    flat, left, want = lam.reshape(-1).tolist(), rank * sum(costs), [False] * lam.numel()
    for i in sorted(range(len(flat)), key=lambda i: (-flat[i], i)):
        if costs[i // lam.shape[1]] <= left:
            want[i], left = True, left - costs[i // lam.shape[1]]
    keep = keep_largest(lam, rank, costs)
    assert keep.reshape(-1).tolist() == want
    assert spent(keep, costs) <= rank * sum(costs)


@given(costs_of(budgets()))
@settings(deadline=None)
def test_less_than_any_rank_left_out_is_unspent(case) -> None:
    lam, rank, costs = case
    keep = keep_largest(lam, rank, costs)
    left = rank * sum(costs) - spent(keep, costs)
    assert all(cost > left for cost, row in zip(costs, keep, strict=True) if not row.all())


@given(budgets(values=TIES), st.integers(1, 9))
@settings(deadline=None)
def test_layers_of_one_width_have_one_budget_of_both_kinds(case, cost) -> None:
    lam, rank = case
    assert torch.equal(keep_largest(lam, rank, [cost] * len(lam)), keep_largest(lam, rank))


def test_a_wide_layer_with_the_larger_lambda_goes_first() -> None:
    """λ per parameter would keep both ranks of the narrow layer, and nothing of the wide one."""
    lam = torch.tensor([[0.5, 0.5], [0.6, 0.1]])
    assert keep_largest(lam, 1, [2, 4]).tolist() == [[True, False], [True, False]]


def test_a_rank_that_no_longer_fits_is_skipped() -> None:
    """Of 6 parameters the first rank leaves 2: the next one in order needs 4, the third one 2."""
    lam = torch.tensor([[0.2, 0.1], [0.9, 0.8]])
    assert keep_largest(lam, 1, [2, 4]).tolist() == [[True, False], [True, False]]


@given(budgets(values=st.integers(0, 10**6)), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_permuted_distinct_values_keep_the_permuted_ranks(case, random) -> None:
    lam, rank = case
    lam = lam.double() * 100 + torch.arange(lam.numel()).reshape(lam.shape)  # no two alike
    order = list(range(lam.numel()))
    random.shuffle(order)
    permuted = lam.reshape(-1)[order].reshape(lam.shape)
    want = keep_largest(lam, rank).reshape(-1)[order].reshape(lam.shape)
    assert torch.equal(keep_largest(permuted, rank), want)


def test_full_budget_keeps_every_rank() -> None:
    assert keep_largest(torch.rand(3, 4), 4).all()


def test_a_layer_may_keep_all_or_none() -> None:
    lam = torch.tensor([[1.0, 1.0], [3.0, 3.0]])
    assert keep_largest(lam, 1).tolist() == [[False, False], [True, True]]


@pytest.mark.parametrize("rank", [0, -1, 5])
def test_an_impossible_budget_is_an_error_that_names_the_range(rank) -> None:
    with pytest.raises(UserError, match=rf"Rank budget {rank} .* 1 to r_max = 4"):
        keep_largest(torch.rand(3, 4), rank)


def test_nan_is_an_error() -> None:
    lam = torch.rand(3, 4)
    lam[1, 2] = torch.nan
    with pytest.raises(UserError, match="NaN"):
        keep_largest(lam, 2)
