"""The calibrated prior: temperature by hand, in training, in prediction and in an adapter."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from one_client import one_client
from torch.nn import functional as F

import fedp2eft
from fedp2eft.adapters.export import load_adapter
from fedp2eft.errors import UserError
from fedp2eft.experiment.train import train
from fedp2eft.methods import METHODS
from fedp2eft.tasks.causal_lm import CausalLM
from fedp2eft.tasks.encoded import Encoded
from fedp2eft.tasks.label_prior import (
    TEMPERATURES,
    adjusted,
    calibrated,
    label_counts,
    own_prior,
    temperature,
)
from tiny import TASK
from tiny_run import World, write_jsonl

Q = torch.tensor([0.2, 0.3, 0.5])


def client_with(**changes):
    return replace(one_client(), **{"label_prior": Q} | changes)


def test_temperature_is_the_best_of_the_grid_by_hand() -> None:
    torch.manual_seed(1)
    logits, labels = 5 * torch.randn(30, 3), torch.arange(30) % 3
    p = torch.tensor([0.5, 0.25, 0.25])

    def loss(t: float) -> float:
        z = (logits - Q.log()) / t + p.log()
        return float(F.cross_entropy(z, labels, reduction="sum")) + torch.tensor(t).log() ** 2 / 2

    best = temperature(logits, labels, p, Q)
    assert best == min(TEMPERATURES.tolist(), key=loss)
    assert best > 2  # random logits of this size are far too sure


@settings(max_examples=20, deadline=None)
@given(scale=st.sampled_from([0.25, 0.5, 2.0, 4.0]), seed=st.integers(0, 99))
def test_labels_drawn_from_the_model_give_its_own_scale_back(scale: float, seed: int) -> None:
    """Labels that follow p(x)·softmax(f / scale): T is the scale, whatever the shift of labels."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(4000, 3, generator=generator)
    p = torch.tensor([0.6, 0.3, 0.1])
    truth = ((logits * scale - Q.log()) / scale + p.log()).softmax(dim=1)
    labels = torch.multinomial(truth, 1, generator=generator).squeeze(1)
    assert temperature(logits * scale, labels, p, Q) == pytest.approx(scale, rel=0.16)


def test_few_rows_stay_near_one_and_none_at_one() -> None:
    sure, wrong = 20 * torch.eye(3), torch.tensor([1, 2, 0])
    many = temperature(sure.repeat(10, 1), wrong.repeat(10), Q, Q)
    assert 1 < temperature(sure[:1], wrong[:1], Q, Q) < many
    assert temperature(sure[:0], wrong[:0], Q, Q) == pytest.approx(1)
    task = calibrated(TASK, sure[:0], Encoded.from_rows([], []), Q)
    assert task.offset.tolist() == pytest.approx([0, 0, 0], abs=1e-6)


def test_calibrated_prior_by_hand() -> None:
    client = client_with()
    with client.bt.off():
        train, test = (
            TASK.logits(client.bt.model, data, 64) for data in (client.train, client.test)
        )
    p = own_prior(label_counts(client.train, 3), Q)
    t = temperature(train, torch.from_numpy(client.train.labels), p, Q)
    assert t != 1
    want = TASK.scores_of((test - Q.log()) / t + p.log(), client.test)
    outcome = METHODS["calibrated-prior"].fit(client, 2)
    assert outcome.scores.correct == want.correct
    assert outcome.scores.loss == pytest.approx(want.loss, rel=1e-5)
    assert outcome.weights.parameters() == 4  # one per class, and the temperature
    # A prior that the run adds plays no part in it.
    other = replace(client, task=adjusted(client.task, client.train, Q))
    assert METHODS["calibrated-prior"].fit(other, 2).scores == outcome.scores


def test_an_adapter_is_trained_and_scored_with_it() -> None:
    client = client_with()
    side = client.calibrated()
    found = METHODS["lora+calibrated-prior"].fit(client, 2)
    want = METHODS["lora"].fit(side, 2)
    assert found.scores == want.scores
    assert found.scores != METHODS["lora"].fit(client, 2).scores
    assert found.weights.temperature == side.task.temperature
    assert torch.equal(found.weights.offset, side.task.offset)
    assert client.carrying(found.weights) is found.weights


def test_held_out_rows_of_a_trial_have_no_temperature_of_all_rows() -> None:
    trial = client_with().calibrated().trial(0.25)
    assert trial.task.temperature == 1


def test_which_methods_have_the_variant() -> None:
    have = {name.partition("+")[0] for name in METHODS if name.endswith("+calibrated-prior")}
    assert {"lora", "adalora", "fedp2eft", "fedp2eft-structure", "gradient"} <= have
    # asks the seen clients, is trained under other settings, has its own way, or has no rank
    assert not have & {"lora-tuned", "fedp2eft-paper", "auto", "prior", "base"}


def test_a_task_without_classes_is_refused() -> None:
    client = client_with(task=CausalLM(0, 16))
    with pytest.raises(UserError, match="no classes"):
        client.calibrated()


def test_a_run_and_a_new_client_make_the_same_adapter(world: World, tmp_path: Path) -> None:
    methods = ["calibrated-prior", "fedp2eft+calibrated-prior"]
    settings = world.settings(
        base__rounds=1, federation__rounds=1, evaluation__pools=["unseen"], evaluation__ranks=[2],
        evaluation__methods=methods,
    )  # fmt: skip
    results = train(settings, tmp_path / "run")
    assert {row.method for row in results.rows} == set(methods)
    name, base = "fr-unseen-00", tmp_path / "run" / "base"
    psg = fedp2eft.PSG.from_pretrained(tmp_path / "run" / "psg")
    data = write_jsonl(tmp_path / "rows.jsonl", world.client_rows(name, "train"))
    made = fedp2eft.personalize(psg, base, data, 2, method="calibrated-prior", precision="fp32")
    saved = load_adapter(tmp_path / "run" / "adapters" / name / "calibrated-prior-r0").head
    assert saved is not None
    torch.testing.assert_close(made.weights.head.weight, saved.weight)
    torch.testing.assert_close(made.weights.head.bias, saved.bias)
    # plain PEFT scores as the method did
    [cell] = (tmp_path / "run" / "cells" / "calibrated-prior-r0").glob(f"{name}.json")
    test = write_jsonl(tmp_path / "test.jsonl", world.client_rows(name, "test"))
    made.save(tmp_path / "adapter")
    scores = fedp2eft.evaluate(base, test, tmp_path / "adapter", precision="fp32")
    assert scores.loss == pytest.approx(json.loads(cell.read_text())["loss"], rel=1e-4)
