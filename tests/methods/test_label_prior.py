"""Label-prior correction, against sums by hand."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from math import log

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from one_client import adapted, asked, one_client

from fedp2eft.adapters.btlora import BTLora
from fedp2eft.errors import UserError
from fedp2eft.methods import METHODS
from fedp2eft.methods.settings import TuningSettings
from fedp2eft.tasks.classification import Classification
from fedp2eft.tasks.encoded import Encoded
from fedp2eft.tasks.label_prior import offset, smoothed
from tiny import disturb, tiny_rows

COUNTS = st.lists(st.integers(0, 50), min_size=3, max_size=3)


@pytest.fixture(scope="module")
def bt() -> BTLora:
    adapter = adapted()
    disturb(adapter)  # the base's logits are asked for, whatever the adapter holds
    return adapter


def labelled(labels: list[int], seed: int) -> Encoded:
    return replace(tiny_rows([5] * len(labels), seed=seed), labels=np.array(labels))


def shift(own: list[int], pooled: list[int]) -> list[float]:
    """log p − log q with half a row more in each of the classes."""
    return [
        log((o + 0.5) / (sum(own) + 1.5)) - log((p + 0.5) / (sum(pooled) + 1.5))
        for o, p in zip(own, pooled, strict=True)
    ]


def correct(logits: list[list[float]], labels: list[int], by: list[float], tau: float) -> int:
    moved = [[x + tau * d for x, d in zip(row, by, strict=True)] for row in logits]
    return sum(row.index(max(row)) == label for row, label in zip(moved, labels, strict=True))


def counts(labels: list[int]) -> list[int]:
    found = Counter(labels)
    return [found[c] for c in range(3)]


@given(own=COUNTS.filter(any), pooled=COUNTS)
def test_correction_is_the_smoothed_log_ratio(own, pooled) -> None:
    found = offset(torch.tensor(own).double(), smoothed(torch.tensor(pooled).double()))
    assert found.tolist() == pytest.approx(shift(own, pooled), abs=1e-9)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), tau=st.sampled_from([0.25, 1.0, 2.0]))
def test_scores_are_those_of_the_moved_logits(bt, seed, tau) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(9, 3)).tolist()
    train, test = rng.integers(0, 3, 24).tolist(), rng.integers(0, 3, 9).tolist()
    pooled = rng.integers(0, 100, 3).tolist()
    client = one_client(
        bt=bt, train=labelled(train, 1), test=labelled(test, 2), own=TuningSettings(taus=[tau]),
        prepared={"best": torch.tensor([0.0]), "all": torch.tensor(pooled).float()},
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Classification, "logits", lambda *_: torch.tensor(logits))
        outcome = METHODS["label-prior"].fit(client, 0)
    by = shift(counts(train), pooled)
    assert outcome.weights is None
    assert outcome.scores.correct == correct(logits, test, by, tau)
    moved = torch.tensor(logits).double() + tau * torch.tensor(by).double()
    loss = -torch.log_softmax(moved, dim=1)[range(9), test].mean().item()
    assert outcome.scores.loss == pytest.approx(loss, abs=1e-5)


def some_logits(_task, _model, data: Encoded, _size: int) -> torch.Tensor:
    """Logits that know the label of a row a little."""
    generator = torch.Generator().manual_seed(int(data.tokens.sum()))
    noise = torch.randn(len(data), 3, generator=generator)
    return 2 * noise + 3 * torch.eye(3)[torch.from_numpy(data.labels)]


def test_whole_survey_by_hand(bt, monkeypatch) -> None:
    """Counts of 75 % and of all rows, summed; the τ that most held-out rows like, asked of all."""
    monkeypatch.setattr(Classification, "logits", some_logits)
    rng = np.random.default_rng(3)
    taus = [0.25, 1.0, 4.0]
    tuning = TuningSettings(taus=[4.0, 0.25, 1.0], holdout=0.25)
    skewed = [[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]]
    clients = [
        one_client(n, bt=bt, train=labelled(rng.choice(3, size=120, p=p).tolist(), n), own=tuning)
        for n, p in enumerate(skewed)
    ]
    told = asked("label-prior", clients, 0)
    trials = [client.trial(0.25) for client in clients]
    every = [counts(client.train.labels.tolist()) for client in clients]
    kept = [counts(trial.train.labels.tolist()) for trial in trials]
    assert [len(trial.test) for trial in trials] == [30] * 3
    assert told["all"].tolist() == np.sum(every, axis=0).tolist()
    assert told["kept"].tolist() == np.sum(kept, axis=0).tolist()
    right = [0, 0, 0]
    pooled = np.sum(kept, axis=0).tolist()
    for trial, own in zip(trials, kept, strict=True):
        logits = some_logits(None, None, trial.test, 10).tolist()
        for i, tau in enumerate(taus):
            right[i] += correct(logits, trial.test.labels.tolist(), shift(own, pooled), tau)
    assert right[1] > max(right[0], right[2])
    assert told["best"].tolist() == [right.index(max(right))]


def test_tau_is_judged_by_the_rows_that_are_not_held_out(bt, monkeypatch) -> None:
    """Own and pooled frequencies are both those of the kept rows: the held-out ones are a test."""
    monkeypatch.setattr(Classification, "logits", some_logits)
    client = one_client(
        own=TuningSettings(), bt=bt, train=labelled([0] * 30 + [1] * 20 + [2] * 30, 5)
    )
    pools = {"kept": [90, 5, 5], "all": [5, 5, 90]}
    told = {name: torch.tensor(pool).float() for name, pool in pools.items()}
    trial = client.trial(0.25)
    logits, labels = some_logits(None, None, trial.test, 9).tolist(), trial.test.labels.tolist()
    own = counts(trial.train.labels.tolist())
    expected = {
        name: [correct(logits, labels, shift(own, pool), 0.25 * n) for n in range(1, 9)]
        for name, pool in pools.items()
    }
    assert expected["kept"] != expected["all"]
    answer = METHODS["label-prior"].surveys[1].ask(replace(client, prepared=told), 0)
    assert answer["good"].tolist() == expected["kept"]


def test_base_s_own_logits_are_corrected(bt) -> None:
    """With the client's frequencies equal to the pooled ones nothing moves."""
    client = one_client(own=TuningSettings(), bt=bt)
    pooled = torch.tensor(counts(client.train.labels.tolist())).float()
    told = {"best": torch.tensor([2.0]), "all": pooled}
    found = METHODS["label-prior"].fit(replace(client, prepared=told), 0).scores
    assert found == METHODS["base"].fit(client, 0).scores


def test_client_without_test_rows_has_no_score(bt) -> None:
    told = {"best": torch.tensor([0.0]), "all": torch.ones(3)}
    client = one_client(own=TuningSettings(), bt=bt, test=tiny_rows([]), prepared=told)
    assert METHODS["label-prior"].fit(client, 0).scores.examples == 0


def test_task_without_classes_is_a_user_error(bt) -> None:
    client = one_client(own=TuningSettings(), bt=bt, task=object())
    with pytest.raises(UserError, match="this task has no classes"):
        asked("label-prior", [client], 0)
