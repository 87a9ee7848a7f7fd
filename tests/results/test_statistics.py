"""Intervals over seeds and over clients, against numbers from elsewhere and simulated truth."""

from __future__ import annotations

from math import gamma, pi, sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedp2eft.results.statistics import estimate, paired_difference, t_quantile


@pytest.mark.parametrize("freedom", [*range(1, 13), 20, 30, 60, 200])
def test_t_quantiles_leave_two_and_a_half_percent_above(freedom: int):
    """The density, integrated from 0 to the quantile, must give 47.5 %."""
    scale = gamma((freedom + 1) / 2) / (sqrt(freedom * pi) * gamma(freedom / 2))
    x = np.linspace(0, t_quantile(freedom), 200_001)
    y = scale * (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
    assert np.trapezoid(y, x) == pytest.approx(0.475, abs=1e-5)


def test_estimates_over_seeds():
    made = estimate({52: 0.4, 42: 0.5, 62: 0.6})
    assert made is not None
    assert made.mean == pytest.approx(0.5)
    assert made.half_width == pytest.approx(4.30265 * 0.1 / sqrt(3))
    assert list(made.seeds) == [42, 52, 62]
    one = estimate({7: 0.25})
    assert one is not None
    assert (one.mean, one.half_width) == (0.25, None)
    assert estimate({}) is None


def simulated(rng: np.random.Generator, clients: int, languages: int, seeds: int = 1):
    """Two methods on the same clients; the mean difference over all clients there could be is 5 %.

    Clients differ in how much they gain (standard deviation 6 %), rows by chance.
    """
    names = [f"l{n % languages}" for n in range(clients * languages)]
    rows = np.full((seeds, len(names)), 60)
    gain = rng.normal(0.05, 0.06, len(names))
    mine = rng.binomial(rows, np.clip(0.6 + gain, 0, 1))
    return mine, rng.binomial(rows, 0.6), rows, names


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered, runs = 0, 200
    for run in range(runs):
        found = paired_difference(*simulated(rng, 4, 5), seed=run % 2)
        assert found.low is not None
        assert found.high is not None
        assert found.low <= found.value <= found.high
        covered += found.low <= 0.05 <= found.high
    assert 0.90 <= covered / runs <= 0.985


def test_the_value_and_the_interval_by_hand():
    """One language, two clients: each resample is one of them, so the ends are their differences.

    A second language whose clients are all alike only shifts it.
    """
    mine, theirs = np.array([[6, 1]]), np.array([[5, 3]])
    found = paired_difference(mine, theirs, np.array([[10, 10]]), ["a", "a"], seed=0)
    assert found.value == pytest.approx((7 - 8) / 20)
    assert (found.low, found.high) == pytest.approx((-0.2, 0.1))
    mine, theirs = np.array([[6, 1, 4, 4]]), np.array([[5, 3, 2, 2]])
    rows = np.array([[10, 10, 5, 5]])
    found = paired_difference(mine, theirs, rows, ["a", "a", "b", "b"], seed=0)
    assert found.value == pytest.approx((-0.05 + 0.4) / 2)
    assert (found.low, found.high) == pytest.approx(((-0.2 + 0.4) / 2, (0.1 + 0.4) / 2))


def test_a_name_under_two_seeds_is_two_clients():
    """One client a language, two seeds: one of the two is drawn each time and stands for both."""
    mine, theirs = np.array([[9.0], [3.0]]), np.array([[5.0], [5.0]])
    found = paired_difference(mine, theirs, np.full((2, 1), 10.0), ["a"], seed=0)
    assert found.value == pytest.approx(0.1)
    assert (found.low, found.high) == pytest.approx((-0.2, 0.4))
    alone = paired_difference(mine[:1], theirs[:1], np.full((1, 1), 10.0), ["a"], seed=0)
    assert (alone.low, alone.high) == (None, None)


def test_each_seed_may_have_languages_of_its_own():
    """Seed 1 has a and b, seed 2 has b and c: a seed is the mean of its own two languages."""
    mine = np.array([[6, 8, 5, 7, 0, 0], [0, 0, 9, 9, 2, 4]])
    theirs = np.array([[4, 6, 5, 7, 0, 0], [0, 0, 5, 5, 3, 5]])
    rows = np.array([[10, 10, 10, 10, 0, 0], [0, 0, 10, 10, 10, 10]])
    found = paired_difference(mine, theirs, rows, ["a", "a", "b", "b", "c", "c"], seed=0)
    # By seed and language: 0.2 and 0; 0.4 and -0.1.
    assert found.value == pytest.approx(((0.2 + 0) / 2 + (0.4 - 0.1) / 2) / 2)
    # Only b differs between its clients: two per seed, 0, 0 and 0.4, 0.4.
    assert (found.low, found.high) == pytest.approx(((0.2 + 0 - 0.1) / 4, (0.2 + 0.8 - 0.1) / 4))


def test_the_comparison_is_paired():
    """Accuracies that differ wildly between clients, by the same gain: no doubt about the gain."""
    theirs = np.array([[1, 20, 40, 60]])
    found = paired_difference(theirs + 10, theirs, np.full((1, 4), 100), ["a"] * 4, seed=0)
    assert (found.value, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1))


def test_a_language_with_one_client_has_no_interval():
    mine, theirs = np.array([[6, 1, 4]]), np.array([[5, 3, 2]])
    found = paired_difference(mine, theirs, np.full((1, 3), 10), ["a", "a", "b"], seed=0)
    assert found.value == pytest.approx((-0.05 + 0.2) / 2)
    assert (found.low, found.high) == (None, None)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 5), st.integers(1, 3), st.integers(1, 3))
def test_the_other_way_round_is_the_other_sign(seed: int, clients: int, languages: int, seeds: int):
    mine, theirs, rows, names = simulated(np.random.default_rng(seed), clients, languages, seeds)
    one = paired_difference(mine, theirs, rows, names, seed=3)
    other = paired_difference(theirs, mine, rows, names, seed=3)
    assert one.low is not None
    assert one.high is not None
    assert (one.value, one.low, one.high) == pytest.approx(
        (-other.value, -(other.high or 0), -(other.low or 0)), abs=1e-12
    )
