"""The label prior: by hand, as methods, as an offset of every method that trains."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from one_client import LOCAL, adapted, one_client
from safetensors.torch import load_file
from torch.nn import functional as F

import fedp2eft
from fedp2eft.adapters.export import load_adapter
from fedp2eft.client.training import stage1
from fedp2eft.errors import UserError
from fedp2eft.experiment.compare import compare
from fedp2eft.experiment.train import train
from fedp2eft.methods import METHODS, check_task
from fedp2eft.results.tables import write_tables
from fedp2eft.settings.experiment import (
    BaseSettings,
    GeneratorSettings,
    LocalSettings,
    ModelSettings,
    Settings,
)
from fedp2eft.settings.peers import PrivacySettings
from fedp2eft.settings.profiles import PAPER
from fedp2eft.tasks.encoded import Encoded
from fedp2eft.tasks.label_prior import adjusted, label_counts, offset, own_prior, smoothed
from tiny import TASK, tiny_rows
from tiny_run import LABELS, World, write_jsonl

CLASSES = 3


def rows(labels: list[int]) -> Encoded:
    return Encoded.from_rows([[1, 2]] * len(labels), labels)


# ── by hand ─────────────────────────────────────────────────────────────────────────────────────


def test_p_q_and_z_by_hand() -> None:
    counts = label_counts(rows([0, 0, 2]), CLASSES)
    assert counts.tolist() == [2.0, 0.0, 1.0]
    q = smoothed(torch.tensor([3.0, 5.0, 0.0]))
    assert q.tolist() == pytest.approx([3.5 / 9.5, 5.5 / 9.5, 0.5 / 9.5])
    assert own_prior(counts, q).tolist() == pytest.approx([2.5 / 4.5, 0.5 / 4.5, 1.5 / 4.5])
    shift = offset(counts, q)
    want = [math.log(p / 4.5 / (n / 9.5)) for p, n in ((2.5, 3.5), (0.5, 5.5), (1.5, 0.5))]
    assert shift.tolist() == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("labels", [[], [1], [1, 1, 1, 1]], ids=["none", "one", "one class"])
def test_few_labels(labels) -> None:
    q = torch.tensor([0.2, 0.3, 0.5])
    shift = offset(label_counts(rows(labels), CLASSES), q)
    assert bool(torch.isfinite(shift).all())
    if not labels:
        assert torch.equal(shift, torch.zeros(CLASSES))  # p is q
    else:
        n = len(labels)
        assert float(shift[0]) == pytest.approx(math.log(0.5 / (n + 1.5) / 0.2), rel=1e-5)


# ── methods ─────────────────────────────────────────────────────────────────────────────────────


def test_prior_scores_the_base_with_shifted_logits() -> None:
    client = replace(one_client(), label_prior=torch.tensor([0.2, 0.3, 0.5]))
    found = METHODS["prior"].fit(client, 0)
    with client.bt.off():
        logits = TASK.logits(client.bt.model, client.test, 64)
    z = logits + offset(label_counts(client.train, CLASSES), client.label_prior)
    assert found.scores == TASK.scores_of(z, client.test)
    assert found.scores.loss != METHODS["base"].fit(client, 0).scores.loss
    with pytest.raises(UserError, match="label prior of the seen clients is not known"):
        METHODS["prior"].fit(one_client(), 0)


def test_majority_answers_the_most_frequent_label_of_equals_the_first() -> None:
    client = one_client()
    test = rows([2, 1, 1, 0])
    for labels, answer, right in (([2, 2, 1], 2, 1), ([0, 1, 1, 0], 0, 1), ([], 0, 1)):
        client = replace(client, train=rows(labels), test=test)
        found = METHODS["majority"].fit(client, 0)
        assert found.weights is None
        assert found.scores.correct == right == int((test.labels == answer).sum())
        counts = torch.tensor([float(labels.count(c)) for c in range(CLASSES)])
        p = smoothed(counts)
        loss = -sum(math.log(float(p[c])) for c in test.labels) / len(test)
        assert found.scores.loss == pytest.approx(loss, rel=1e-5)
    unseen = replace(client, label_prior=torch.tensor([0.1, 0.6, 0.3]))
    assert METHODS["majority"].fit(unseen, 0).scores.correct == 2  # without labels: q's


@pytest.mark.parametrize("method", ["majority", "prior", "calibrated-prior", "label-prior"])
def test_causal_lms_are_refused_in_one_line(method) -> None:
    settings = Settings(model=ModelSettings(task="causal_lm"))
    with pytest.raises(UserError, match=rf"Method {method} .* no classes: leave it out\.") as error:
        check_task(method, settings)
    assert "\n" not in str(error.value)
    assert settings.evaluation.methods == ["base", "unigram", "lora", "fedp2eft"]
    assert Settings().evaluation.methods == [
        "majority", "base", "prior", "calibrated-prior", "lora", "fedp2eft",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"local": LocalSettings(logit_adjustment="own")}, r"local\.logit_adjustment"),
        ({"base": BaseSettings(logit_adjustment="own")}, r"base\.logit_adjustment"),
        ({"generator": GeneratorSettings(label_features=True)}, r"generator\.label_features"),
    ],
)
def test_settings_about_classes_need_classes(changes, words) -> None:
    with pytest.raises(UserError, match=words + " needs classes, and model.task is causal_lm"):
        Settings(model=ModelSettings(task="causal_lm"), **changes)
    Settings(**changes)


def test_a_base_cannot_be_trained_with_its_own_prediction() -> None:
    with pytest.raises(UserError, match="predicted is what the trained base predicts"):
        Settings(
            base=BaseSettings(logit_adjustment="own"), local=LocalSettings(label_prior="predicted")
        )


# ── the offset ──────────────────────────────────────────────────────────────────────────────────


def test_training_with_the_offset_is_training_with_shifted_logits() -> None:
    """Packed, padded and by hand."""
    q = torch.tensor([0.2, 0.3, 0.5])
    data = tiny_rows([5, 3, 7, 4, 6, 2])
    own = adjusted(TASK, data, q)
    shift = offset(label_counts(data, CLASSES), q)
    assert shift.abs().max() > 0.1

    class ByHand(type(TASK)):
        def loss(self, model, batch):
            inputs = {key: value for key, value in batch.items() if key != "labels"}
            return F.cross_entropy(model(**inputs).logits + shift, batch["labels"])

        def packed_loss(self, model, data):
            return None

    local = LocalSettings(dropout=False, batch_size=3, lr=1e-2, lambda_lr=0.1)
    order, found = [range(3), range(3, 6)] * 2, []
    for task in (own, ByHand(pad_id=0, max_length=16), TASK):
        bt = adapted()
        bt.reset(0.5)
        losses = stage1(bt, task, data, [torch.tensor(r).numpy() for r in order], local, PAPER)
        found.append((losses, bt.lam.detach().clone()))
    (one, lam), (two, by_hand), (plain, _) = found
    assert one == pytest.approx(two, rel=1e-5)
    assert torch.allclose(lam, by_hand, atol=1e-5)
    assert one != pytest.approx(plain, rel=1e-3)


TRAINING = [
    name
    for name, method in METHODS.items()
    if method.ranked and not (method.surveys or method.phase or "+" in name)
]


@pytest.mark.parametrize("name", TRAINING)
def test_the_offset_changes_what_a_method_trains(name) -> None:
    q = torch.tensor([0.05, 0.15, 0.8])
    found = []
    for on in (False, True):
        kind = METHODS[name].settings
        client = replace(one_client(), label_prior=q, own=kind() if kind else None)
        client = replace(client, settings=replace(LOCAL, personalize_lr=1e-2))
        if on:
            client = replace(client, task=adjusted(client.task, client.train, q))
        found.append(METHODS[name].fit(client, 2).weights)
    plain, own = (torch.cat([layer.B.flatten() for layer in w.layers]) for w in found)
    assert plain.shape != own.shape or (plain - own).abs().max() > 1e-5


def test_held_out_labels_are_not_in_the_offset_of_a_trial() -> None:
    q = torch.tensor([0.2, 0.3, 0.5])
    client = replace(one_client(), label_prior=q)
    client = replace(client, task=adjusted(client.task, client.train, q))
    trial = client.trial(0.25)
    want = offset(label_counts(trial.train, CLASSES), q)
    assert torch.equal(trial.task.offset, want)
    assert not torch.equal(trial.task.offset, client.task.offset)


# ── a whole run ─────────────────────────────────────────────────────────────────────────────────


def run(world: World, folder: Path, **changes: Any) -> Any:
    short = {"base__rounds": 1, "federation__rounds": 1, "evaluation__pools": ["unseen"]}
    methods = ["majority", "base", "prior", "lora", "fedp2eft"]
    settings = world.settings(
        **{**short, "evaluation__methods": methods, "evaluation__ranks": [2], **changes}
    )
    return train(settings, folder)


@pytest.mark.parametrize("source", ["counts", "predicted", "uniform"])
def test_where_q_comes_from(world: World, tmp_path: Path, source) -> None:
    results = run(
        world, tmp_path / "run", local__label_prior=source, local__logit_adjustment="own",
        generator__label_features=True,
    )  # fmt: skip
    assert {row.method for row in results.rows} == {"majority", "base", "prior", "lora", "fedp2eft"}
    kept = json.loads((tmp_path / "run" / "label-prior.json").read_text())
    assert kept["source"] == source
    assert sum(kept["q"]) == pytest.approx(1, abs=1e-5)
    config = json.loads((tmp_path / "run" / "psg" / "config.json").read_text())
    assert config["label_prior"] == pytest.approx(kept["q"])
    assert config["local"]["logit_adjustment"] == "own"
    if source == "counts":
        federation = world_labels(world)
        assert kept["q"] == pytest.approx(smoothed(federation).tolist(), rel=1e-5)
    elif source == "uniform":
        assert kept["q"] == pytest.approx([1 / 3] * 3)


def world_labels(world: World) -> torch.Tensor:
    """Label counts of all seen clients."""
    from fedp2eft.data.registry import load_clients

    federation = load_clients(world.settings().data)
    labels = [federation.answers(c.train, "classification") for c in federation.pool("seen")]
    found = torch.cat([torch.tensor(list(each)) for each in labels])
    return torch.bincount(found, minlength=len(federation.labels)).float()


def test_base_training_and_cohorts_with_the_offset(world: World, tmp_path: Path) -> None:
    """Clients in one batch have their own offsets; the base is trained with each client's."""
    own = {"base__logit_adjustment": "own", "local__logit_adjustment": "own"}
    found = []
    for cohort in (1, 4):
        folder = tmp_path / str(cohort)
        run(world, folder, **own, local__dropout=False, federation__cohort=cohort,
            evaluation__methods=["fedp2eft"])  # fmt: skip
        found.append(load_file(folder / "psg" / "model.safetensors"))
    one, many = found
    assert all(torch.allclose(value, many[name], atol=1e-5) for name, value in one.items())
    run(world, tmp_path / "plain", local__dropout=False, evaluation__methods=["fedp2eft"])
    plain = load_file(tmp_path / "plain" / "base" / "model.safetensors")
    base = load_file(tmp_path / "1" / "base" / "model.safetensors")
    assert not torch.equal(plain["classifier.bias"], base["classifier.bias"])


def test_a_new_client_gets_the_offset_of_the_psgs_q(world: World, tmp_path: Path) -> None:
    run(world, tmp_path / "run", local__logit_adjustment="own", generator__label_features=True)
    psg = fedp2eft.PSG.from_pretrained(tmp_path / "run" / "psg")
    path = write_jsonl(tmp_path / "rows.jsonl", world.client_rows("fr-unseen-00", "train"))
    adapter = fedp2eft.personalize(psg, tmp_path / "run" / "base", path, 2, precision="fp32")
    saved = tmp_path / "run" / "adapters" / "fr-unseen-00" / "fedp2eft-r2"
    head = load_adapter(saved).head
    assert head is not None
    assert adapter.weights.head is not None
    # the classifier's bias is frozen, so it holds the base's bias and the offset alone
    assert torch.allclose(adapter.weights.head.bias, head.bias, atol=1e-6)
    base = load_file(tmp_path / "run" / "base" / "model.safetensors")["classifier.bias"]
    labels = [LABELS.index(row["label"]) for row in world.client_rows("fr-unseen-00", "train")]
    shift = offset(label_counts(rows(labels), 3), torch.tensor(psg.config.label_prior))
    assert torch.allclose(head.bias - base, shift, atol=1e-5)


def test_a_comparison_runs_with_and_without_the_offset(world: World, tmp_path: Path) -> None:
    methods = ["base", "prior", "lora", "lora+prior", "fedp2eft+prior"]
    settings = world.settings(
        base__rounds=1, federation__rounds=1, evaluation__methods=methods, evaluation__ranks=[2],
        evaluation__pools=["unseen"], compare__seeds=[1],
    )  # fmt: skip
    found = write_tables(compare(settings, tmp_path / "cmp"))
    assert {line.method for line in found.lines} == set(methods)
    loss = {
        path.stem: [c["loss"] for c in json.loads(path.read_text())["clients"]]
        for path in (tmp_path / "cmp" / "cells").glob("**/*.json")
    }
    assert loss["lora-r2"] != loss["lora+prior-r2"]


def test_with_privacy_the_query_is_in_the_account(world: World, tmp_path: Path) -> None:
    pytest.importorskip("dp_accounting")
    privacy = {"clipping": "fixed", "clip_norm": 1.0, "noise_multiplier": 2.0, "test_seed": 3}
    spent = []
    for methods in (["fedp2eft"], ["prior", "fedp2eft"]):
        folder = tmp_path / methods[0]
        run(world, folder, privacy=privacy, evaluation__methods=methods)
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        spent.append([json.loads(x)["epsilon"] for x in lines if "epsilon" in x][-1])
    kept = json.loads((tmp_path / "prior" / "label-prior.json").read_text())
    assert kept["asked"] == 1
    assert sum(kept["q"]) == pytest.approx(1, abs=1e-5)
    assert kept["q"] != pytest.approx(smoothed(world_labels(world)).tolist(), rel=1e-3)
    two = privacy_epsilon(2.0, 2)
    assert spent == [pytest.approx(privacy_epsilon(2.0, 1)), pytest.approx(two)]


def privacy_epsilon(z: float, times: int) -> float:
    """Of so many Gaussian mechanisms, straight from dp-accounting."""
    from dp_accounting import GaussianDpEvent, SelfComposedDpEvent
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant()
    accountant.compose(SelfComposedDpEvent(GaussianDpEvent(z), times))
    return accountant.get_epsilon(PrivacySettings().delta)
