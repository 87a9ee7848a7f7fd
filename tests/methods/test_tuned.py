"""Learning rate and scale chosen on held-out rows of the seen clients."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from one_client import LOCAL, Chosen, adapted, asked, one_client

from fedp2eft.errors import UserError
from fedp2eft.methods import METHODS, ClientSide, Outcome
from fedp2eft.methods.settings import TuningSettings
from fedp2eft.methods.tuned import best, goodness, grid
from fedp2eft.tasks.encoded import Encoded
from fedp2eft.tasks.task import Scores
from tiny import tiny_rows

TUNED = ("lora-tuned", "fedp2eft-tuned")


def of_one_class(label: int, rows: int = 24) -> Encoded:
    return replace(tiny_rows([6] * rows, seed=4), labels=np.full(rows, label))


@pytest.mark.parametrize("method", TUNED)
def test_only_rate_that_learns_is_chosen(method) -> None:
    """All rows have a class that the base never says: a tiny rate gets none of them right."""
    bt, never = adapted(), 1
    with torch.no_grad():
        bt.model.get_base_model().classifier.bias[never] = -1.0
    tuning = TuningSettings(lrs=[0.05, 1e-6, 1e-7, 1e30], holdout=0.25)
    settings = replace(LOCAL, personalize_epochs=4)
    client = one_client(bt=bt, train=of_one_class(never), own=tuning, settings=settings)
    [survey] = METHODS[method].surveys
    answer = survey.ask(client, 2)
    assert answer["good"].tolist() == [0, 0, 6, 0]
    assert answer["diverged"].tolist() == [0, 0, 0, 1]
    told = survey.combine(answer, 1)
    assert told["best"].tolist() == [2]
    unseen = one_client(1, bt=bt, test=of_one_class(never, 7), train=of_one_class(never))
    unseen = replace(unseen, own=tuning, settings=settings, prepared=told)
    assert METHODS[method].fit(unseen, 2).scores.correct == 7


def test_smaller_rate_then_smaller_scale_wins_a_tie() -> None:
    tuning = TuningSettings(lrs=[0.3, 0.1], scales=[2.0, 0.5, 2.0])
    assert grid(tuning) == [(0.1, 0.5), (0.1, 2.0), (0.3, 0.5), (0.3, 2.0)]
    assert chosen([1.0, 2, 2, 2]) == 1
    assert chosen([0.0] * 4) == 0


def test_a_choice_that_diverged_anywhere_comes_last() -> None:
    assert chosen([1.0, 9, 3, 9], [0, 1, 0, 2]) == 2
    assert chosen([-5.0, 0, 0, 0], [0, 1, 1, 1]) == 0
    assert chosen([1.0, 0, 3], [2, 1, 1]) == 2


def chosen(good: list[float], diverged: list[float] | None = None) -> int:
    sums = {"good": good, "diverged": diverged or [0.0] * len(good)}
    doubles = {name: torch.tensor(value).double() for name, value in sums.items()}
    return int(best(doubles, 2)["best"])


@given(st.lists(st.integers(0, 9), min_size=5, max_size=5))
def test_best_is_the_first_of_the_largest_sums(sums) -> None:
    assert chosen(sums) == sums.index(max(sums))


@pytest.mark.parametrize("method", TUNED)
def test_trials_see_the_same_rows_and_never_the_test(method, monkeypatch) -> None:
    """Every trial trains on one half and is scored on the other, alike in labels."""
    labels = np.arange(24) % 3
    client = one_client(train=replace(tiny_rows([5] * 24, seed=1), labels=labels))
    client = replace(client, own=TuningSettings([1e-3, 1e-2], [1.0, 3.0], holdout=0.5))
    seen = []

    def fit(self, lam, keep, settings):
        seen.append((self.train, self.test, settings.personalize_lr, lam[keep].mean().item()))
        return Outcome(Scores(len(self.test), len(seen), 0.0), None)

    monkeypatch.setattr(ClientSide, "fit", fit)
    [survey] = METHODS[method].surveys
    assert survey.ask(client, 2)["good"].tolist() == [1, 2, 3, 4]
    rates, scales = [each[2] for each in seen], [each[3] for each in seen]
    assert rates == [1e-3, 1e-3, 1e-2, 1e-2]
    assert scales == pytest.approx([1, 3, 1, 3])  # mean λ: 1 in both methods
    every = [tuple(client.train.tokens[5 * i : 5 * i + 5]) for i in range(24)]
    for train, test, *_ in seen:
        assert np.array_equal(train.tokens, seen[0][0].tokens)
        rows = [
            tuple(part.tokens[5 * i : 5 * i + 5])
            for part in (train, test)
            for i in range(len(part))
        ]
        assert (len(train), len(test)) == (12, 12)
        assert sorted(rows) == sorted(every)
        assert sorted(test.labels) == [0] * 4 + [1] * 4 + [2] * 4


def test_tuned_fit_is_the_method_at_the_chosen_rate(monkeypatch) -> None:
    client = one_client(prepared={"best": torch.tensor([3.0])}, own=TuningSettings())
    calls = []
    monkeypatch.setattr(ClientSide, "fit", lambda *args: calls.append(args[1:]))
    METHODS["lora"].fit(client, 2)
    METHODS["lora-tuned"].fit(client, 2)
    METHODS["fedp2eft"].fit(client, 2)
    METHODS["fedp2eft-tuned"].fit(client, 2)
    lora, tuned, psg, psg_tuned = calls
    assert torch.equal(lora[0], tuned[0])
    assert torch.equal(lora[1], tuned[1])
    assert torch.equal(psg[1], psg_tuned[1])
    torch.testing.assert_close(psg_tuned[0], psg[0] / psg[0][psg[1]].mean())
    assert psg_tuned[0][psg_tuned[1]].mean().item() == pytest.approx(1.0)
    for _, _, settings in (tuned, psg_tuned):
        assert settings == replace(client.settings, personalize_lr=3e-3)  # the fourth of the grid


@pytest.mark.parametrize("rows", [0, 1])
def test_client_without_rows_to_hold_out_says_nothing(rows, monkeypatch) -> None:
    Chosen(monkeypatch)
    client = one_client(train=tiny_rows([5] * rows), own=TuningSettings())
    assert asked("lora-tuned", [client], 1)["best"].tolist() == [0]
    [survey] = METHODS["lora-tuned"].surveys
    assert survey.ask(client, 1)["good"].tolist() == [0] * 5


def test_survey_tells_its_progress() -> None:
    shares: list[float] = []
    settings = replace(LOCAL, batch_size=18, personalize_epochs=1)
    client = one_client(settings=settings, progress=shares.append)
    [survey] = METHODS["lora-tuned"].surveys
    survey.ask(replace(client, own=TuningSettings(lrs=[1e-4, 1e-3])), 1)
    assert shares == [0.5, 1.0]


def test_causal_lm_is_judged_by_its_likelihood() -> None:
    assert goodness(Scores(4, None, 0.5, tokens=30)) == -15.0
    assert goodness(Scores(4, 3, 0.5)) == 3.0


@pytest.mark.parametrize(
    "bad", [{"lrs": []}, {"scales": [0.0]}, {"taus": [-1.0]}, {"holdout": 0.0}, {"holdout": 1.0}]
)
def test_impossible_settings_are_refused(bad) -> None:
    with pytest.raises(UserError, match=f"tuning.{next(iter(bad))}"):
        TuningSettings(**bad)
