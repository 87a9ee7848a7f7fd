"""Rows of tokens: packing, batches, choice, order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedp2eft.tasks.encoded import Encoded

ROWS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [14, 15]]
TYPES = [[0, 0, 1], [0], [0, 0, 0, 1, 1], [0, 1]]
LABELS = [2, 0, 1, 2]
DATA = Encoded.from_rows(ROWS, LABELS, TYPES)


def rows_of(data: Encoded) -> list[list[int]]:
    return [data.tokens[a:b].tolist() for a, b in zip(data.offsets, data.offsets[1:], strict=False)]


def test_packing_keeps_rows_labels_and_types() -> None:
    assert len(DATA) == 4
    assert rows_of(DATA) == ROWS
    assert DATA.lengths.tolist() == [3, 1, 5, 2]
    assert DATA.labels.tolist() == LABELS
    assert DATA.types.tolist() == [kind for row in TYPES for kind in row]
    assert [x.dtype for x in (DATA.tokens, DATA.types, DATA.offsets, DATA.labels)] == [
        np.int32, np.int32, np.int64, np.int64,
    ]  # fmt: skip


def test_a_batch_is_padded_on_the_right_to_its_own_longest_row() -> None:
    batch = DATA.batch([3, 0], pad_id=99)
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[14, 15, 99], [5, 6, 7]],
        "attention_mask": [[1, 1, 0], [1, 1, 1]],
        "token_type_ids": [[0, 1, 0], [0, 0, 1]],
        "labels": [2, 2],
    }
    assert {value.dtype for value in batch.values()} == {torch.int64}


def test_a_batch_can_be_padded_further() -> None:
    batch = DATA.batch([1, 2], pad_id=1, length=6)
    assert batch["input_ids"].tolist() == [[8, 1, 1, 1, 1, 1], [9, 10, 11, 12, 13, 1]]
    assert batch["attention_mask"].sum(dim=1).tolist() == [1, 5]


def test_a_padding_token_inside_a_row_counts_as_real() -> None:
    batch = Encoded.from_rows([[0, 3, 0], [4]], [0, 1]).batch([0, 1], pad_id=0)
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_rows_without_types_give_batches_without_types() -> None:
    assert set(Encoded.from_rows(ROWS, LABELS).batch([0], pad_id=0)) == {
        "input_ids", "attention_mask", "labels",
    }  # fmt: skip


def test_a_row_may_come_twice_in_a_batch() -> None:
    batch = DATA.batch(np.array([1, 1, 3]), pad_id=0)
    assert batch["input_ids"].tolist() == [[8, 0], [8, 0], [14, 15]]


def test_select_takes_the_given_rows_in_the_given_order() -> None:
    chosen = DATA.select(np.array([2, 0]))
    assert rows_of(chosen) == [ROWS[2], ROWS[0]]
    assert chosen.labels.tolist() == [1, 2]
    assert chosen.types.tolist() == TYPES[2] + TYPES[0]
    for name, value in DATA.batch([2, 0], pad_id=0).items():
        assert torch.equal(chosen.batch([0, 1], pad_id=0)[name], value)


def test_select_of_nothing_is_empty() -> None:
    nothing = DATA.select([])
    assert len(nothing) == 0
    assert nothing.offsets.tolist() == [0]
    assert list(nothing.by_length(3)) == []
    assert len(Encoded.from_rows([], [])) == 0


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=30),
    tokens=st.integers(1, 150),
    seed=st.integers(0, 9),
)
@settings(deadline=None)
def test_a_sample_holds_whole_rows_up_to_the_bound_and_one_row_at_least(
    lengths, tokens, seed
) -> None:
    data = Encoded.from_rows([[row] * n for row, n in enumerate(lengths)], range(len(lengths)))
    sample = data.sample(tokens, seed)
    rows = sample.labels.tolist()
    assert rows == sorted(set(rows))
    assert rows_of(sample) == [[row] * lengths[row] for row in rows]
    assert len(sample.tokens) <= tokens or len(rows) == 1
    left_out = [n for row, n in enumerate(lengths) if row not in rows]
    assert not left_out or len(sample.tokens) + max(left_out) > tokens
    assert rows == data.sample(tokens, seed).labels.tolist()


def test_samples_of_other_seeds_are_other_rows() -> None:
    data = Encoded.from_rows([[1, 2]] * 40, range(40))
    drawn = {tuple(data.sample(20, seed).labels.tolist()) for seed in range(5)}
    assert len(drawn) == 5
    assert {len(rows) for rows in drawn} == {10}


@given(st.lists(st.integers(0, 9), max_size=30), st.integers(1, 12))
@settings(deadline=None)
def test_by_length_covers_every_row_once_longest_first(lengths, batch_size) -> None:
    data = Encoded.from_rows([[1] * n for n in lengths], [0] * len(lengths))
    batches = list(data.by_length(batch_size))
    rows = np.concatenate(batches).tolist() if batches else []
    assert sorted(rows) == list(range(len(lengths)))
    assert [lengths[row] for row in rows] == sorted(lengths, reverse=True)
    assert all(len(batch) == batch_size for batch in batches[:-1])


@given(st.lists(st.lists(st.integers(0, 200_000), min_size=1, max_size=6), min_size=1, max_size=9))
@settings(deadline=None)
def test_what_is_packed_comes_back_from_a_batch(rows) -> None:
    data = Encoded.from_rows(rows, range(len(rows)))
    batch = data.batch(range(len(rows)), pad_id=7)
    assert batch["input_ids"].shape[1] == max(len(row) for row in rows)
    for ids, mask, row in zip(batch["input_ids"], batch["attention_mask"], rows, strict=True):
        assert ids[mask.bool()].tolist() == row
        assert (ids[~mask.bool()] == 7).all()


@pytest.mark.parametrize("label", [0, 7])
def test_labels_may_be_an_array(label) -> None:
    assert Encoded.from_rows([[1]], np.array([label], np.int32)).labels.tolist() == [label]
