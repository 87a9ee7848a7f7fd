"""How different clients' structures are, against hand-made λ."""

from __future__ import annotations

import pytest
import torch

from fedp2eft.experiment.structure import structure

LAYERS = ("encoder.layer.0.query", "encoder.layer.0.dense", "encoder.layer.1.query")
LANGUAGES = {"a": "fr", "b": "fr", "c": "de"}


def lam(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows)


def test_overlap_within_and_between_languages():
    """r = 1 keeps three of 3 × 2 ranks; a and b share two of them, c shares one with each."""
    found = structure(
        4,
        {
            "a": lam([9.0, 8.0], [7.0, 1.0], [1.0, 1.0]),  # keeps (0,0) (0,1) (1,0)
            "b": lam([9.0, 8.0], [1.0, 1.0], [7.0, 1.0]),  # keeps (0,0) (0,1) (2,0)
            "c": lam([1.0, 9.0], [1.0, 8.0], [1.0, 7.0]),  # keeps (0,1) (1,1) (2,1)
        },
        LANGUAGES,
        LAYERS,
        [1, 2],
    )
    assert (found["round"], found["clients"]) == (4, 3)
    assert found["overlap_language"][1] == pytest.approx(2 / 3)
    assert found["overlap_languages"][1] == pytest.approx(1 / 3)
    assert found["overlap"][1] == pytest.approx((2 / 3 + 1 / 3 + 1 / 3) / 3)
    assert found["overlap"][2] == found["overlap_language"][2] == 1.0  # every rank is kept
    assert found["kinds"][1] == pytest.approx(
        {"encoder.layer.*.query": 7 / 9, "encoder.layer.*.dense": 2 / 9}
    )


def test_spread_within_a_client_and_between_clients():
    """Mean 2, standard deviation 1 within each client; no difference between two of them."""
    one = lam([1.0, 3.0], [1.0, 3.0], [1.0, 3.0])
    same = structure(0, {"a": one, "c": one.clone()}, LANGUAGES, LAYERS, [1])
    assert same["level"] == pytest.approx(2.0)
    assert same["spread"] == pytest.approx(0.5)
    assert same["personal"] == 0.0
    assert same["overlap"] == {1: 1.0}
    assert same["overlap_language"] == {1: None}  # no two clients of one language
    double = structure(0, {"a": one, "c": 3 * one}, LANGUAGES, LAYERS, [1])
    assert double["spread"] == pytest.approx(0.5)
    assert double["personal"] == pytest.approx(0.5)  # 1 and 3 around 2
