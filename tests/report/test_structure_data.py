"""λ that is kept, its grid and its order."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedp2eft.adapters.budget import keep_largest
from fedp2eft.experiment.lambdas import FILE, Lambdas, ask_again, read_lambdas
from fedp2eft.files import read_json
from fedp2eft.report.structure import clustered, grid_of, kept_by_language, likeness


def made(lam: dict[str, list[float]]) -> Lambdas:
    """One layer; a client speaks the language that its name begins with."""
    tensors = {name: torch.tensor([value]) for name, value in lam.items()}
    spoken = {name: name[:2] for name in lam}
    return Lambdas(tensors, spoken, dict.fromkeys(lam, "seen"), ("a.0.query",), (1,), "")


def test_lambda_that_is_kept_gives_the_ranks_of_the_adapters(finished):
    found = read_lambdas(finished.folder)
    assert found is not None
    for client, lam in found.lam.items():
        facts = read_json(finished.folder / "adapters" / client / "fedp2eft-r2" / "fedp2eft.json")
        kept = keep_largest(lam, 2).sum(1).tolist()
        assert dict(zip(found.layers, kept, strict=True)) == facts["ranks"]
        assert found.languages[client] == facts["language"]


def test_asking_the_psg_again_gives_the_same(finished, tmp_path):
    run = shutil.copytree(finished.folder, tmp_path / "run")
    (run / FILE).unlink()
    (run / "structure.json").unlink()
    again, kept = ask_again(run), read_lambdas(finished.folder)
    assert again is not None
    assert kept is not None
    assert again.lam.keys() == kept.lam.keys()
    assert all(torch.equal(again.lam[name], kept.lam[name]) for name in kept.lam)
    assert read_json(run / "structure.json") == read_json(finished.folder / "structure.json")


def test_lambda_of_another_psg_or_damaged_is_none(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished.folder / "psg", run / "psg")
    shutil.copy(finished.folder / FILE, run / FILE)
    assert read_lambdas(run) is not None
    (run / "psg" / "model.safetensors").write_bytes(b"other")
    assert read_lambdas(run) is None
    shutil.rmtree(run / "psg")
    assert read_lambdas(run) is not None  # published without its PSG
    whole = (run / FILE).read_bytes()
    for damaged in (b"", whole[:40], whole[:-8], whole.replace(b'layers\\"', b'lawers\\"')):
        (run / FILE).write_bytes(damaged)
        assert read_lambdas(run) is None


def test_grid_of_layers():
    names = ["m.layer.0.q", "m.layer.0.v", "m.layer.10.q", "m.layer.2.q", "pooler", "m.layer.10.v"]
    grid = grid_of(names)
    assert grid.modules == ["q", "v", "pooler"]
    assert grid.layers == ["0", "2", "10", "–"]
    assert grid.spread(np.arange(6.0)) == [
        [0.0, 3.0, 2.0, None],
        [1.0, None, 5.0, None],
        [None, None, None, 4.0],
    ]


def test_kept_ranks_are_means_over_a_languages_clients():
    lambdas = made({"de1": [3.0, 1.0], "de2": [1.0, 3.0], "fr1": [1.0, 2.0]})
    kept = kept_by_language(lambdas, [1, 9], "ranks")[1]
    assert {name: value.tolist() for name, value in kept.items()} == {"de": [1.0], "fr": [1.0]}


def test_kept_ranks_of_a_budget_in_parameters():
    lam = {"de1": torch.tensor([[1.0, 1.0], [3.0, 2.0]])}
    found = Lambdas(lam, {"de1": "de"}, {"de1": "seen"}, ("0.a", "0.b"), (1,), "", (1, 4))
    assert kept_by_language(found, [1], "parameters")[1]["de"].tolist() == [1.0, 1.0]
    assert kept_by_language(found, [1], "ranks")[1]["de"].tolist() == [0.0, 2.0]
    assert kept_by_language(found, [1, 3], "ranks").keys() == {1}
    assert kept_by_language(replace(found, costs=()), [1], "parameters") == {}


def test_alike_languages_stand_together():
    found = made({"de": [1, 2, 3.0], "ja": [3, 2, 1.0], "nl": [1, 2, 3.1], "ko": [3, 2, 1.1]})
    names, alike = likeness(found)
    assert {frozenset(names[:2]), frozenset(names[2:])} == {
        frozenset({"de", "nl"}), frozenset({"ja", "ko"}),
    }  # fmt: skip
    assert alike[names.index("de"), names.index("nl")] > 0.9
    assert alike[names.index("de"), names.index("ja")] < 0
    assert np.diag(alike).tolist() == pytest.approx([1.0] * 4)


def test_languages_that_do_not_differ_are_no_error():
    names, alike = likeness(made({"de": [1, 2.0], "fr": [1, 2.0], "pl": [1, 2.0]}))
    assert len(names) == 3
    assert np.isfinite(alike).all()
    assert likeness(made({"de": [1, 2.0], "fr": [1, 2.0]}))[0] == []


def test_order_of_clusters_is_whole():
    rng = np.random.default_rng(0)
    alike = np.corrcoef(rng.normal(size=(7, 20)))
    assert sorted(clustered(alike)) == list(range(7))


def test_structure_file_is_about_the_same_clients(finished):
    found = read_lambdas(finished.folder)
    assert found is not None
    told = json.loads((finished.folder / "structure.json").read_text(encoding="utf-8"))
    assert told[-1]["clients"] == len(found.lam)
