"""The Dirichlet split: who gets which rows, whatever the labels."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedp2eft.data.allocation import allocate, fit_to_both
from fedp2eft.data.partition import (
    dirichlet_partition,
    local_validation_split,
    partition_pools,
    rng_for,
)
from fedp2eft.errors import UserError
from fedp2eft.settings.data import DataSettings

labels = st.lists(st.integers(0, 6), min_size=12, max_size=150)
split = settings(max_examples=150, deadline=None)


def draw(train, test, clients, alpha, seed=0, **limits):
    return dirichlet_partition(train, test, clients, alpha, np.random.default_rng(seed), **limits)


@split
@given(labels, labels, st.integers(1, 12), st.floats(0.01, 100), st.integers(0, 99))
def test_equal_sizes_and_each_row_at_most_once(train, test, clients, alpha, seed):
    parts = draw(train, test, clients, alpha, seed)
    assert len(parts) == clients
    for side, rows in enumerate((train, test)):
        assert {len(part[side]) for part in parts} == {len(rows) // clients}
        used = np.concatenate([part[side] for part in parts])
        assert len(np.unique(used)) == len(used)
        assert used.min() >= 0
        assert used.max() < len(rows)
        assert all((np.diff(part[side]) > 0).all() for part in parts)
        assert used.dtype == np.int64


@split
@given(st.data(), st.integers(1, 8), st.integers(1, 12), st.floats(0.01, 5))
def test_allocation_keeps_sizes_and_stock(data, kinds, clients, alpha):
    stock = np.array(data.draw(st.lists(st.integers(0, 40), min_size=kinds, max_size=kinds)))
    stock[0] += clients
    size = int(data.draw(st.integers(1, stock.sum() // clients)))
    wanted = np.random.default_rng(0).dirichlet(np.full(kinds, alpha), size=clients)
    if data.draw(st.booleans()):
        wanted[:] = np.eye(kinds)[-1]
    counts = allocate(wanted, stock, size)
    assert (counts >= 0).all()
    assert (counts.sum(axis=1) == size).all()
    assert (counts.sum(axis=0) <= stock).all()
    if ((wanted * size).sum(axis=0) + clients <= stock).all():
        assert (np.abs(counts - wanted * size) < 1 + 1e-4).all()


def test_a_short_label_is_scaled_down_alike_for_all():
    """Both want 8 of the first label and there are 8: each gets 4, whoever comes first."""
    wanted, stock = np.array([[0.8, 0.2, 0.0], [0.8, 0.0, 0.2]]), np.array([8, 20, 20])
    assert allocate(wanted, stock, 10).tolist() == [[4, 6, 0], [4, 0, 6]]


def test_allocation_keeps_stock_where_clients_want_one_label_each():
    """Shares so skewed that scaling does not settle."""
    for seed in range(60):
        rng = np.random.default_rng(seed)
        stock = rng.integers(0, 60, 9) ** 2 + 2
        counts = allocate(rng.dirichlet(np.full(9, 0.001), size=14), stock, stock.sum() // 14)
        assert (counts >= 0).all()
        assert (counts.sum(axis=1) == stock.sum() // 14).all()
        assert (counts.sum(axis=0) <= stock).all()


@split
@given(labels, labels, st.integers(1, 12), st.integers(1, 9), st.integers(1, 9))
def test_limits_cap_the_client_size(train, test, clients, max_train, max_test):
    parts = draw(train, test, clients, 0.5, max_train=max_train, max_test=max_test)
    assert {len(part[0]) for part in parts} == {min(len(train) // clients, max_train)}
    assert {len(part[1]) for part in parts} == {min(len(test) // clients, max_test)}


@split
@given(labels, labels, st.integers(1, 12), st.integers(0, 99))
def test_same_seed_same_split(train, test, clients, seed):
    for one, other in zip(
        draw(train, test, clients, 0.5, seed), draw(train, test, clients, 0.5, seed), strict=True
    ):
        np.testing.assert_array_equal(one[0], other[0])
        np.testing.assert_array_equal(one[1], other[1])


def test_other_seed_other_split():
    rows = np.arange(400) % 7
    splits = {
        tuple(np.concatenate([part[0] for part in draw(rows, rows, 5, 0.5, seed)]).tolist())
        for seed in range(20)
    }
    assert len(splits) == 20


@split
@given(st.integers(2, 7), st.integers(1, 8), st.sampled_from([0.05, 0.5, 5.0]), st.integers(0, 99))
def test_train_and_test_share_the_proportions_where_rows_last(kinds, clients, alpha, seed):
    """With so many rows of each label that none runs out, only rounding separates the two."""
    train, test = np.arange(40 * clients * kinds) % kinds, np.arange(20 * clients * kinds) % kinds
    for mine, held in draw(train, test, clients, alpha, seed, max_train=40, max_test=20):
        share = np.bincount(train[mine], minlength=kinds) / 40
        test_share = np.bincount(test[held], minlength=kinds) / 20
        assert np.abs(share - test_share).max() < 1 / 20


def test_train_and_test_agree_also_where_labels_run_short():
    """All rows are given away: clients differ hardly more than the two pools themselves do."""
    rng = np.random.default_rng(0)
    train, test = rng.integers(0, 10, 570), rng.integers(0, 10, 200)
    distances = []
    for seed in range(10):
        for mine, held in draw(train, test, 5, 0.5, seed):
            share = np.bincount(train[mine], minlength=10) / len(mine)
            test_share = np.bincount(test[held], minlength=10) / len(held)
            distances.append(np.abs(share - test_share).sum() / 2)
    pools = np.bincount(train) / len(train) - np.bincount(test) / len(test)
    assert np.mean(distances) < np.abs(pools).sum() / 2 + 0.05
    assert np.max(distances) < 0.35


def test_shares_are_fitted_to_the_scarcer_stock():
    """Test rows limit the first label to 0.4 of two clients, train rows the second to 1.0."""
    wanted, many = np.array([[0.8, 0.2], [0.2, 0.8]]), np.array([100, 100])
    found = fit_to_both(wanted, many, np.array([4, 16]), 10, 10)
    np.testing.assert_allclose(found.sum(axis=0), [0.4, 1.6], atol=1e-3)
    np.testing.assert_allclose(found.sum(axis=1), 1)
    odds = found[:, 0] / found[:, 1]
    assert odds[0] / odds[1] == pytest.approx((0.8 / 0.2) / (0.2 / 0.8), rel=1e-4)
    found = fit_to_both(wanted, np.array([100, 10]), many, 10, 10)
    np.testing.assert_allclose(found.sum(axis=0), [1, 1], atol=1e-3)
    # Where the stocks leave room for 1.6 of 2 clients, each label's room grows by a quarter.
    found = fit_to_both(wanted, np.array([4, 100]), np.array([100, 12]), 10, 10)
    np.testing.assert_allclose(found.sum(axis=0), [0.5, 1.5], atol=1e-3)
    # No label that both parts have: nothing to fit.
    np.testing.assert_array_equal(
        fit_to_both(wanted, np.array([9, 0]), np.array([0, 9]), 4, 4), wanted
    )


def test_where_test_rows_run_short_both_parts_give_way():
    """Few test rows, all of them dealt: by train rows alone they go where they can."""
    train, test = np.arange(400) % 4, np.arange(40) // 10
    counts = {
        kind: [
            (np.bincount(train[mine], minlength=4).tolist(), np.bincount(test[held], minlength=4))
            for mine, held in draw(train, test, 4, 0.5, max_train=20, proportions=kind)
        ]
        for kind in ("train", "both")
    }
    assert [mine for mine, _ in counts["train"]] == [
        [5, 0, 11, 4], [2, 6, 8, 4], [14, 1, 0, 5], [6, 7, 7, 0],
    ]  # fmt: skip
    assert [held.tolist() for _, held in counts["train"]] == [
        [2, 0, 5, 3], [0, 4, 3, 3], [5, 1, 0, 4], [3, 5, 2, 0],
    ]  # fmt: skip
    assert [mine for mine, _ in counts["both"]] == [
        [4, 0, 9, 7], [1, 8, 6, 5], [11, 1, 0, 8], [4, 10, 6, 0],
    ]  # fmt: skip
    for mine, held in counts["both"]:
        assert (np.abs(np.array(mine) / 2 - held) <= 0.5).all()


@split
@given(labels, labels, st.integers(1, 12), st.sampled_from([0.05, 0.5, 5.0]), st.integers(0, 99))
def test_fitting_to_both_changes_nothing_without_shortage(train, test, clients, alpha, seed):
    rows = np.repeat(np.arange(7), 40)
    plain, fitted = (
        draw(rows, rows, 2, alpha, seed, max_train=9, max_test=9, proportions=kind)
        for kind in ("train", "both")
    )
    for one, other in zip(plain, fitted, strict=True):
        np.testing.assert_array_equal(one[0], other[0])
        np.testing.assert_array_equal(one[1], other[1])
    parts = draw(train, test, clients, alpha, seed, proportions="both")
    for side, rows in enumerate((train, test)):
        used = np.concatenate([part[side] for part in parts])
        assert {len(part[side]) for part in parts} == {len(rows) // clients}
        assert len(np.unique(used)) == len(used)


def test_small_alpha_is_skewed_and_large_alpha_alike():
    rows = np.arange(5000) % 10

    def largest_share(alpha):
        parts = draw(rows, rows, 10, alpha, max_train=100, max_test=10)
        return np.mean([np.bincount(rows[part[0]]).max() / 100 for part in parts])

    assert largest_share(0.05) > 0.6
    assert largest_share(0.5) > 0.3
    assert largest_share(1000) < 0.15


def test_a_label_without_rows_left_is_made_up_from_the_others():
    train, test = np.array([0] * 2 + [1] * 98), np.array([0] * 50 + [1] * 50)
    parts = draw(train, test, 2, 1.0)
    assert [len(part[0]) for part in parts] == [50, 50]
    assert sum((train[part[0]] == 0).sum() for part in parts) == 2


def test_labels_may_be_names():
    names = np.array(["net", "doc"] * 20)
    parts = draw(names, names, 2, 0.5)
    assert len(parts[0][0]) == 20


@pytest.mark.parametrize(
    ("arguments", "limits", "message"),
    [
        (([0] * 3, [0] * 9, 4, 0.5), {}, "3 train rows cannot be split over 4 clients"),
        (([0] * 9, [0] * 3, 4, 0.5), {}, "3 test rows cannot be split over 4 clients"),
        (([0] * 9, [0] * 9, 0, 0.5), {}, "clients must be above 0: 0"),
        (([0] * 9, [0] * 9, 2, 0.0), {}, "alpha must be above 0: 0.0"),
        (([0] * 9, [0] * 9, 2, float("nan")), {}, "alpha must be above 0: nan"),
        (([0] * 9, [0] * 9, 2, 0.5), {"max_train": 0}, "max_train must be above 0: 0"),
        (([0] * 9, [0] * 9, 2, 0.5), {"max_test": -1}, "max_test must be above 0: -1"),
    ],
)
def test_impossible_splits_are_refused(arguments, limits, message):
    with pytest.raises(UserError, match=message):
        draw(*arguments, **limits)


def test_a_refused_pool_is_named():
    rows = np.arange(3)
    with pytest.raises(UserError, match=r"fr, seen pool: 3 train rows"):
        partition_pools(
            {("fr", "seen"): (rows, rows)}, np.zeros(3), DataSettings(clients_per_language=4)
        )


@split
@given(labels, st.floats(0.0, 0.99), st.integers(0, 99))
def test_held_out_rows(values, fraction, seed):
    kept, held = local_validation_split(values, fraction, np.random.default_rng(seed))
    assert sorted([*kept, *held]) == list(range(len(values)))
    if fraction == 0:
        assert len(held) == 0
    else:
        assert len(held) == min(max(round(fraction * len(values)), 1), len(values) - 1)
    again = local_validation_split(values, fraction, np.random.default_rng(seed))
    np.testing.assert_array_equal(held, again[1])
    share = np.bincount(values, minlength=7) * len(held) / len(values)
    assert (np.abs(np.bincount(np.take(values, held), minlength=7) - share) <= 1).all()


def test_a_single_row_is_kept():
    kept, held = local_validation_split(["a"], 0.5, np.random.default_rng(0))
    assert (kept.tolist(), held.tolist()) == ([0], [])


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_held_out_share_has_a_range(fraction):
    with pytest.raises(UserError, match="share of held-out rows"):
        local_validation_split([0, 1], fraction, np.random.default_rng(0))


def test_generators_depend_on_every_part_of_the_key():
    keys = [(0, "fr", "seen"), (1, "fr", "seen"), (0, "fr", "unseen"), (0, "frs", "een"), (0,)]
    assert len({rng_for(*key).integers(2**62) for key in keys}) == len(keys)
    assert rng_for(0, "fr", "seen").integers(2**62) == rng_for(0, "fr", "seen").integers(2**62)
