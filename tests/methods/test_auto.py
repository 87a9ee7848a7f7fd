"""Method auto: the federation's choice by hand, the client's guard by hand, and both in a run."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from one_client import LOCAL, adapted, one_client

import fedp2eft
from fedp2eft.client.descent import _STEPS, local_order, steps_taken
from fedp2eft.errors import UserError
from fedp2eft.federation.server.evaluation import summed
from fedp2eft.federation.wire.messages import SURVEY
from fedp2eft.generator import PSG
from fedp2eft.methods import METHODS
from fedp2eft.methods.auto import candidates as module
from fedp2eft.methods.auto import choice, guard
from fedp2eft.methods.auto.candidate import Candidate
from fedp2eft.methods.auto.candidates import (
    candidates,
    fit,
    folds,
    held_out,
    row_likelihoods,
    settings_for,
    with_prior,
)
from fedp2eft.methods.auto.choice import ask, choose
from fedp2eft.methods.auto.guard import auto, decide, half_steps, preferred
from fedp2eft.methods.auto.settings import AutoSettings
from fedp2eft.methods.lora import uniform
from fedp2eft.results.cards import psg_card
from fedp2eft.tasks.causal_lm import CausalLM
from fedp2eft.tasks.encoded import Encoded
from fedp2eft.tasks.task import Scores
from tiny import TASK, tiny_rows
from tiny_run import World, write_jsonl
from watching import watched

Q = torch.tensor([0.2, 0.3, 0.5])
BASE, PRIOR = Candidate("base"), Candidate("prior")
LORA = Candidate("lora", 1e-2, 1, 2)
OWN = AutoSettings(lrs=[1e-2], epochs=[1], hold_out="folds")


def client_with(own: AutoSettings = OWN, **changes):
    return replace(
        one_client(bt=changes.pop("bt", None)), **{"label_prior": Q, "own": own} | changes
    )


# ── candidates ──────────────────────────────────────────────────────────────────────────────────


def test_candidates_come_cheapest_first() -> None:
    own = AutoSettings(
        kinds=["lora", "prior", "base"], lrs=[3e-3, 1e-3], epochs=[4, 2], ranks=[8, 2]
    )
    found = candidates(own, 4, True)
    assert found[:2] == [BASE, PRIOR]
    assert [(c.epochs, c.rank, c.lr) for c in found[2:]] == [
        (epochs, rank, lr) for epochs in (2, 4) for rank in (2, 4) for lr in (1e-3, 3e-3)
    ]
    assert candidates(own, 4, False) == [BASE, *found[2:]]  # no classes: no label prior
    for each in found:  # they travel as float32
        assert Candidate.of(torch.tensor(each.values()).tolist()) == each


def test_folds_are_parts_of_the_rows_alike_in_labels() -> None:
    labels = np.arange(24) % 3
    client = client_with(train=replace(tiny_rows([5] * 24, seed=1), labels=labels))
    parts = folds(client, 4)
    assert sorted(np.concatenate(parts).tolist()) == list(range(24))
    assert [np.bincount(labels[part]).tolist() for part in parts] == [[2, 2, 2]] * 4
    assert [p.tolist() for p in folds(client, 4)] == [p.tolist() for p in parts]


def test_held_out_rows_by_hand() -> None:
    """The base, the prior of the other rows, and an adapter trained on the other rows."""
    client = client_with()
    parts = folds(client, 2)
    found = held_out(client, [BASE, PRIOR, LORA], parts)
    with client.bt.off():
        logits = TASK.logits(client.bt.model, client.train, 64).double()
    labels = torch.from_numpy(client.train.labels)
    assert torch.equal(found[0], logits.log_softmax(1)[range(24), labels])
    for part, rest in (parts, parts[::-1]):
        fold = replace(client, train=client.train.select(rest), test=client.train.select(part))
        task = with_prior(fold).task
        want = (logits[part] / task.temperature + task.offset).log_softmax(1)[
            range(len(part)), labels[part]
        ]
        assert found[1, part].tolist() == pytest.approx(want.tolist(), rel=1e-6)
        scores = fit(fold, LORA).scores
        assert -float(found[2, part].mean()) == pytest.approx(scores.loss, rel=1e-6)


def test_a_candidate_that_diverges_predicts_nothing() -> None:
    client = client_with()
    found = held_out(client, [BASE, Candidate("lora", 1e30, 2, 2)], folds(client, 2))
    assert torch.isfinite(found[0]).all()
    assert (found[1] == -torch.inf).all()


# ── the federation's choice ─────────────────────────────────────────────────────────────────────

SUMS = [[-10.0, -8.0, -7.9], [-12.0, -9.0, -9.1], [-11.0, -8.5, -8.4]]


DIVERGED = -math.inf


def answered(sums: list[list[float]], noise: float = 1.0):
    """The sums over clients of what `ask` answers, one client a row."""

    def held(client, tried, _parts):
        _STEPS.set(_STEPS.get() + 7)
        return torch.tensor(sums[client.seed])[:, None].double()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice, "held_out", held)
        patch.setattr(choice, "candidates", lambda *_: [BASE, PRIOR, LORA])
        own = replace(OWN, noise=noise)
        rows = tiny_rows([5] * 10, seed=1)
        clients = [client_with(own, seed=i, train=rows) for i in range(len(sums))]
        return summed([ask(client, 2) for client in clients]), len(clients)


def chosen(sums: list[list[float]], noise: float = 1.0) -> Candidate:
    return Candidate.of(choose(*answered(sums, noise))["chosen"].tolist())


@given(st.lists(st.lists(st.floats(-900, 0), min_size=3, max_size=3), min_size=2, max_size=5))
@settings(max_examples=15, deadline=None)
def test_the_standard_error_from_sums_is_that_of_the_clients_answers(rows) -> None:
    table = choose(*answered(rows))["table"]
    sums = torch.tensor(rows, dtype=torch.float64)
    best = int(sums.sum(0).argmax())
    error = (sums[:, best, None] - sums).std(dim=0) * len(rows) ** 0.5
    # products of numbers up to 900 are known to 1e-10: so are variances, and errors to 1e-5
    assert (table[:, 6] * 10 * len(rows)).tolist() == pytest.approx(error.tolist(), abs=1e-4)


def test_cheapest_within_noise_is_chosen() -> None:
    """The adapter is best by 0.1 in sum; the standard error of that sum over clients is 0.2."""
    assert chosen(SUMS) == PRIOR
    assert chosen(SUMS, noise=0.4) == LORA
    table = choose(*answered(SUMS))["table"]
    assert table[:, 4].tolist() == pytest.approx([-33 / 30, -25.5 / 30, -25.4 / 30])
    assert table[:, 5].tolist() == pytest.approx([7.6 / 30, 0.1 / 30, 0], abs=1e-6)
    assert table[1, 6].item() == pytest.approx(0.2 / 30, rel=1e-4)
    assert chosen(SUMS[:1]) == LORA  # of one client nothing is known about noise
    assert chosen([[0.0, 0.0, 0.0]] * 2) == BASE
    assert Candidate.of(choose(*answered(SUMS))["adapter"].tolist()) == LORA


def test_of_learning_rates_within_noise_the_best_is_chosen() -> None:
    """They cost the same; so would one with more epochs not, which is better still."""
    tried = [BASE, PRIOR, replace(LORA, lr=1e-3), LORA, replace(LORA, lr=1e-1),
             replace(LORA, epochs=2)]  # fmt: skip
    known = torch.tensor([each.values() for each in tried], dtype=torch.float64)
    sums = torch.tensor([[-20, -9, -8.4, -8.1, -9.0, -7.9], [-20, -9, -8.2, -8.1, -9.0, -8.2]])
    answers = {
        "candidates": 2 * known,
        "sums": sums.sum(dim=0).double(),
        "products": sum(torch.outer(row, row) for row in sums.double()),
        "diverged": torch.zeros(6).double(),
        "rows": torch.tensor([20.0]),
        "noise": torch.tensor([2.0]).double(),
        "steps": torch.zeros(1),
    }
    assert Candidate.of(choose(answers, 2)["chosen"].tolist()) == LORA


def test_a_candidate_that_diverged_anywhere_is_never_chosen() -> None:
    better = [[-10.0, -8.0, -1.0], [-12.0, -9.0, -1.0], [-11.0, -8.5, DIVERGED]]
    assert chosen(better) == PRIOR
    worse = [[-10.0, DIVERGED, -8.0], [-12.0, -9.0, -9.0]]
    assert chosen(worse) == LORA
    assert Candidate.of(choose(*answered(better))["adapter"].tolist()) == PRIOR  # no other is left


def test_clients_answer_sums_alone() -> None:
    client = client_with()
    answer = ask(client, 2)
    tried = candidates(OWN, 2, True)
    assert len(tried) == 5
    assert answer["rows"].tolist() == [24]
    want = held_out(client, tried, folds(client, 2)).sum(dim=1)
    assert torch.equal(answer["sums"], want)
    few = ask(replace(client, own=replace(OWN, min_rows=25)), 2)
    assert (few["rows"].item(), few["sums"].abs().sum().item()) == (0, 0)


def test_more_folds_leave_more_rows_to_train_on() -> None:
    """The label prior of three quarters of the rows is nearer to that of all than that of half."""
    client = client_with()
    own = replace(OWN, kinds=["prior"])
    for number in (2, 4):
        answer = ask(replace(client, own=replace(own, folds=number)), 2)
        want = held_out(client, [PRIOR], folds(client, number)).sum(dim=1)
        assert torch.equal(answer["sums"], want)


# ── the client's guard ──────────────────────────────────────────────────────────────────────────


def test_the_choice_is_left_only_beyond_noise() -> None:
    """Gains of 1 ± 1 over four rows: sum 4, standard error 2·1.1547 = 2.3094."""
    rows = {BASE: torch.tensor([2.0, 0, 2, 0]), PRIOR: torch.zeros(4), LORA: -torch.ones(4)}
    assert preferred(rows, PRIOR, 1.0) == BASE
    assert preferred(rows, PRIOR, 4 / 2.3094 * 1.01) == PRIOR
    assert preferred(rows, BASE, 0.0) == BASE
    assert preferred(rows, LORA, 1.0) == BASE  # of several, the one that is better by most
    rows[LORA] = torch.full((4,), -torch.inf)
    assert preferred(rows, LORA, 1.0) == BASE
    assert preferred(rows, PRIOR, 9.0) == PRIOR


def told(client, choice: Candidate, adapter: Candidate | None = None):
    prepared = {"chosen": torch.tensor(choice.values())}
    if adapter:
        prepared["adapter"] = torch.tensor(adapter.values())
    return replace(client, prepared=prepared)


def test_a_client_tries_the_best_adapter_itself(monkeypatch) -> None:
    """The adapter gains 1 ± 0.1 per row here: it is kept, although the seen clients do without."""
    rows = {BASE: -2.0, PRIOR: -1.5, LORA: -0.5}
    asked = []

    def held(client, tried, _parts):
        asked.append(tried)
        noise = 0.1 * torch.arange(24).remainder(2)
        return torch.stack([rows[each] + noise * (each == LORA) for each in tried])

    monkeypatch.setattr(guard, "held_out", held)
    client = told(client_with(), PRIOR, LORA)
    assert auto(client, 2).choice == "lora"
    assert asked.pop() == [BASE, LORA, PRIOR]
    assert auto(replace(client, own=replace(OWN, try_adapter=False)), 2).choice == "prior"
    assert asked.pop() == [BASE, PRIOR]
    assert auto(told(client, PRIOR), 2).choice == "prior"  # a PSG that keeps no adapter
    assert decide(client, LORA, LORA) == LORA
    assert asked.pop() == [BASE, PRIOR, LORA]
    rows[LORA] = -1.54  # gains 0.24 in sum, with a standard error of 0.25
    assert auto(client, 2).choice == "prior"
    rows[LORA] = -math.inf
    assert auto(client, 2).choice == "prior"


def test_guard_turns_a_harmful_adapter_down() -> None:
    """A rate at which held-out rows get hopeless: the client keeps its prior or the base."""
    wild = Candidate("lora", 3.0, 4, 2)
    client = told(client_with(), wild)
    assert decide(client, wild, wild) in (BASE, PRIOR)
    kept = auto(client, 2)
    assert sum(kept.weights.ranks.values()) == 0
    off = replace(client, own=replace(OWN, guard=False))
    assert decide(off, wild, wild) == wild
    assert decide(replace(client, own=replace(OWN, noise=1e9)), wild, wild) == wild


def test_a_choice_without_training_costs_one_forward_pass(monkeypatch) -> None:
    calls = []
    logits = type(TASK).logits

    def counted(self, model, data, size):
        calls.append(len(data))
        return logits(self, model, data, size)

    monkeypatch.setattr(type(TASK), "logits", counted)
    monkeypatch.setattr(module, "personalize", None)  # nothing is trained
    client = told(client_with(), PRIOR)
    decide(client, PRIOR, None)
    assert calls == [len(client.train)]


def half(**changes):
    return replace(OWN, hold_out="half", **changes)


def test_half_check_never_costs_more_than_one_fine_tuning() -> None:
    """24 rows in mini-batches of 6, two epochs: 8 steps, the first 4 on the first half alone."""
    client = told(client_with(own=half(noise=1e9)), replace(LORA, epochs=2))
    before = steps_taken()
    kept = auto(client, 2)
    assert (kept.choice, steps_taken() - before) == ("lora", 8)
    wild = told(client_with(own=half()), Candidate("lora", 3.0, 2, 2))
    before = steps_taken()
    left = auto(wild, 2)
    assert left.choice in ("base", "prior")
    assert steps_taken() - before == 4
    assert left.weights.parameters() == (4 if left.choice == "prior" else 0)


def test_half_check_holds_the_second_half_out_until_it_is_compared(monkeypatch) -> None:
    """What is compared is the adapter of a fine-tuning on the first half, rows of the second."""
    client = told(client_with(own=half()), LORA)
    first, rest = folds(client, 2)
    seen = []

    def rows(task, model, data, size):
        seen.append((task.offset, data.tokens.tolist(), row_likelihoods(task, model, data, size)))
        return seen[-1][2]

    monkeypatch.setattr(guard, "row_likelihoods", rows)
    auto(client, 2)
    (offset, ids, found), alone = seen.pop(), replace(client, train=client.train.select(first))
    assert ids == client.train.select(rest).tokens.tolist()
    assert not seen
    task = with_prior(alone).task
    assert torch.equal(offset, task.offset)
    # The offset in training is that of all rows; so is that of this fine-tuning on the half.
    side = replace(alone, task=with_prior(client).task, settings=settings_for(client, LORA))
    measured = []
    monkeypatch.setattr(
        type(side), "score", lambda _, model: measured.append(row_likelihoods(
            task, model, client.train.select(rest), 64)) or Scores(0, 0, 0),
    )  # fmt: skip
    side.fit(*uniform(side.bt, 2))
    torch.testing.assert_close(found, measured[0])


def test_half_check_that_passes_ends_with_an_adapter_of_all_rows() -> None:
    client = told(client_with(own=half(noise=1e9)), LORA)
    first, rest = folds(client, 2)
    side = replace(with_prior(client), settings=settings_for(client, LORA))
    epochs, size = LORA.epochs, side.settings.batch_size
    order = [
        rows[batch]
        for rows in (first, rest)
        for batch in local_order(len(rows), epochs, size, client.seed)
    ]
    assert auto(client, 2).scores == side.fit(*uniform(side.bt, 2), order=order).scores


def test_half_check_keeps_an_adapter_that_the_seen_clients_did_without(monkeypatch) -> None:
    gains = {"now": 1.0}

    def rows(task, _model, data, _size):
        return torch.full((len(data),), -0.1 if gains["now"] > 0 else -9.0).double()

    monkeypatch.setattr(guard, "row_likelihoods", rows)
    client = told(client_with(own=half()), PRIOR, LORA)
    assert auto(client, 2).choice == "lora"
    assert auto(replace(client, own=half(try_adapter=False)), 2).choice != "lora"
    gains["now"] = -1.0
    assert auto(client, 2).choice != "lora"


def test_half_check_with_mini_batches_too_few_for_a_step_of_their_own() -> None:
    """One mini-batch of the half per epoch, eight to a step: the folds decide instead."""
    local = replace(LOCAL, batch_size=12, accumulate=8)
    client = told(client_with(own=half(), settings=local), replace(LORA, epochs=1))
    assert half_steps(client, replace(LORA, epochs=1)) == 0
    assert auto(client, 2).choice in ("lora", "prior", "base")


def test_clients_with_few_rows_follow_the_federation() -> None:
    few = told(client_with(train=tiny_rows([5] * 7, seed=3)), LORA)
    assert decide(few, LORA, LORA) == LORA
    assert auto(few, 2).scores == fit(few, LORA).scores
    none = told(client_with(train=Encoded.from_rows([], [])), LORA)
    found = auto(none, 2)
    assert found.scores == METHODS["base"].fit(none, 2).scores
    assert found.weights.parameters() == 0


def test_a_final_fit_that_diverges_leaves_the_prior() -> None:
    client = told(client_with(own=replace(OWN, guard=False)), Candidate("lora", 1e30, 2, 2))
    found = auto(client, 2)
    assert found.scores == METHODS["calibrated-prior"].fit(client, 2).scores
    assert found.weights.parameters() == 4


def test_each_kind_is_the_method_of_its_name() -> None:
    client = client_with()
    assert fit(client, BASE).scores == METHODS["base"].fit(client, 2).scores
    prior = fit(client, PRIOR)
    assert prior.scores == METHODS["calibrated-prior"].fit(client, 2).scores
    assert torch.equal(prior.weights.offset, with_prior(client).task.offset)
    local = replace(LOCAL, personalize_lr=1e-2, personalize_epochs=1)
    adjusted = replace(with_prior(client), settings=local)
    names = {"lora": "lora", "structure": "fedp2eft-structure", "fedp2eft": "fedp2eft"}
    for kind, name in names.items():
        found = fit(client, replace(LORA, kind=kind))
        assert found.scores == METHODS[name].fit(adjusted, 2).scores
        assert torch.equal(found.weights.offset, with_prior(client).task.offset)


def test_base_has_no_offset_where_the_run_adds_one() -> None:
    client = with_prior(client_with())
    found = fit(client, BASE)
    assert found.scores == METHODS["base"].fit(client_with(), 2).scores
    carried = client.carrying(found.weights)
    assert (carried.offset.tolist(), carried.temperature) == ([0, 0, 0], 1)


def test_causal_lms_choose_without_a_prior() -> None:
    rows = [[1, 5, 6, 7], [1, 8, 9], [1, 3, 4, 5, 6], [1, 2, 7, 8]] * 2
    data = Encoded.from_rows(rows, [0] * 8, starts=[2, 1, 3, 2] * 2)
    bt = adapted("gpt2")
    client = client_with(bt=bt, task=CausalLM(0, 16), train=data, test=data, label_prior=None)
    answer = ask(client, 2)
    assert len(answer["sums"]) == 4
    with bt.off():
        scores = client.task.score(bt.model, data, 8)
    assert float(answer["sums"][0]) == pytest.approx(-scores.loss * scores.tokens, rel=1e-4)
    found = auto(told(client, LORA), 2)
    assert found.scores.tokens
    assert found.weights.offset is None


@pytest.mark.parametrize(
    "changes", [{"kinds": []}, {"lrs": [0.0]}, {"epochs": []}, {"folds": 1}, {"min_rows": 1},
                {"noise": -1.0}, {"ranks": [0]}],
)  # fmt: skip
def test_bad_settings_are_named(changes) -> None:
    with pytest.raises(UserError, match=f"auto.{next(iter(changes))}"):
        AutoSettings(**changes)


def test_steps_are_those_of_every_fine_tuning() -> None:
    """24 rows in mini-batches of six; a fold leaves twelve of them."""
    assert LOCAL.batch_size == 6
    client = told(client_with(), LORA)
    before = steps_taken()
    auto(client, 2)
    check, final = 2 * 2, 4
    assert steps_taken() - before in (check, check + final)  # it may turn the adapter down
    assert auto(replace(client, own=replace(OWN, noise=1e9)), 2).choice == "lora"
    assert steps_taken() - before in (2 * check + final, 2 * check + 2 * final)
    trained = [each for each in candidates(OWN, 2, True) if each.epochs]
    assert ask(client, 2)["steps"].tolist() == [len(trained) * 2 * 2]
    assert choose(*answered(SUMS))["steps"].tolist() == [21]
    before = steps_taken()
    assert auto(told(client, PRIOR), 2).choice in ("prior", "base")
    assert steps_taken() == before


# ── in a run ────────────────────────────────────────────────────────────────────────────────────


def test_the_choice_is_kept_with_the_psg_and_used_by_default(
    all_methods, world: World, tmp_path
) -> None:
    folder = all_methods.folder
    kept = json.loads((folder / "surveys" / "auto-r2.json").read_text())["prepared"]
    psg = PSG.from_pretrained(folder / "psg")
    assert psg.config.choices == {"auto-r2": kept}
    assert len(kept["table"]) == 5
    choice = Candidate.of(kept["chosen"])
    assert f"| 2 | {choice} |" in (folder / "psg" / "README.md").read_text(encoding="utf-8")
    data = write_jsonl(tmp_path / "rows.jsonl", world.client_rows("fr-unseen-00", "train"))
    made = fedp2eft.personalize(psg, folder / "base", data, 3)
    assert made.facts["method"] == "auto"
    made.save(tmp_path / "adapter")
    fedp2eft.evaluate(folder / "base", data, tmp_path / "adapter")
    with pytest.raises(UserError, match="keeps no choice of method auto for r = 1"):
        fedp2eft.personalize(psg, folder / "base", data, 1, method="auto")
    bare = PSG(replace(psg.config, choices={}))
    bare.set_phi(psg.phi())
    assert fedp2eft.personalize(bare, folder / "base", data, 2).facts["method"] == "fedp2eft"
    # A choice for a budget in parameters is for that one alone.
    other = PSG(replace(psg.config, choices={"auto-p2": kept}))
    other.set_phi(psg.phi())
    methods = {
        budget: fedp2eft.personalize(other, folder / "base", data, 2, budget=budget).facts["method"]
        for budget in ("ranks", "parameters")
    }
    assert methods == {"ranks": "fedp2eft", "parameters": "auto"}
    assert f"| 2 (in parameters) | {choice} |" in str(psg_card(other.config))


def test_a_resumed_run_asks_nobody_again(all_methods, tmp_path) -> None:
    run = tmp_path / "run"
    shutil.copytree(all_methods.folder, run)
    cell = run / "cells" / "auto-r2" / "de-unseen-00.json"
    before = json.loads(cell.read_text())
    cell.unlink()
    again = watched(fedp2eft.read_settings(run / "settings.yaml"), run)
    assert not [m for m, _ in again.messages if m.metadata.message_type == SURVEY]
    after = json.loads(cell.read_text())
    assert before | {"seconds": 0} == after | {"seconds": 0}
    old, new = ((p / "psg/config.json").read_text() for p in (all_methods.folder, run))
    assert old == new
