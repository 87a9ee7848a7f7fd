"""Every option of the method runs to the end, and does what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedp2eft.experiment.train import train
from fedp2eft.federation.wire.messages import nbytes, to_arrays
from fedp2eft.generator import PSG
from tiny_run import LENGTH, R_MAX, World

SHORT: dict[str, Any] = {
    "base__rounds": 1,
    "federation__rounds": 1,
    "evaluation": {"methods": ["base", "fedp2eft"], "ranks": [2], "pools": ["unseen"]},
}


def run(world: World, folder: Path, **changes: Any) -> PSG:
    """The tiny experiment with changes, to the end; gives its PSG."""
    results = train(world.settings(**(SHORT | changes)), folder)
    assert {(row.method, row.rank, row.clients) for row in results.rows} == {
        ("base", 0, 2),
        ("fedp2eft", 2, 2),
    }
    for client in ("de-unseen-00", "fr-unseen-00"):
        adapter = load_file(
            folder / "adapters" / client / "fedp2eft-r2" / "adapter_model.safetensors"
        )
        assert any(bool(t.any()) for name, t in adapter.items() if ".lora_B." in name)
    return PSG.from_pretrained(folder / "psg")


def messages(folder: Path, phase: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["phase"] == phase]


def test_profile_reference(world: World, tmp_path: Path):
    psg = run(world, tmp_path / "run", federation__profile="reference")
    assert (psg.config.profile, psg.config.feature_kind) == ("reference", "padded")


def test_layerwise(world: World, tmp_path: Path):
    psg = run(world, tmp_path / "run", adapter__layerwise=True)
    assert psg.config.adapter.layerwise
    assert psg(torch.ones(psg.config.n_features)).shape == (len(psg.config.layer_names), 1)
    facts = json.loads(
        (
            tmp_path / "run" / "adapters" / "de-unseen-00" / "fedp2eft-r2" / "fedp2eft.json"
        ).read_text()
    )
    # One λ per layer: a layer keeps all of its ranks or none, but for the last one.
    assert sum(r not in (0, R_MAX) for r in facts["ranks"].values()) <= 1


def test_log_quantity(world: World, tmp_path: Path):
    psg = run(world, tmp_path / "run", generator__log_quantity=True)
    assert psg.config.n_features == 2 * len(psg.config.linear_names) + 1


def test_no_base_training(world: World, tmp_path: Path):
    run(world, tmp_path / "run", base__kind="none")
    assert messages(tmp_path / "run", "base") == []
    trained = load_file(tmp_path / "run" / "base" / "model.safetensors")
    encoder = load_file(world.encoder / "model.safetensors")
    assert all(torch.equal(trained[f"bert.{name}"], encoder[name]) for name in encoder)


@pytest.mark.parametrize("embeddings", [True, False])
def test_training_the_embeddings(world: World, tmp_path: Path, embeddings: bool):
    run(world, tmp_path / "run", base__train_embeddings=embeddings)
    trained = load_file(tmp_path / "run" / "base" / "model.safetensors")
    encoder = load_file(world.encoder / "model.safetensors")
    name = "embeddings.word_embeddings.weight"
    assert torch.equal(trained[f"bert.{name}"], encoder[name]) is not embeddings
    assert not torch.equal(trained["bert.pooler.dense.weight"], encoder["pooler.dense.weight"])
    travels = {key: v for key, v in trained.items() if embeddings or ".word_emb" not in key}
    assert messages(tmp_path / "run", "base")[0]["bytes-up"] == 2 * nbytes(to_arrays(travels))


def test_accumulation(world: World, tmp_path: Path):
    run(world, tmp_path / "run", local__accumulate=2, local__batch_size=3)


def test_compact_adapters_and_no_adapters(world: World, tmp_path: Path):
    evaluation = SHORT["evaluation"] | {"layout": "compact"}
    run(world, tmp_path / "compact", evaluation=evaluation)
    folder = tmp_path / "compact" / "adapters" / "fr-unseen-00" / "fedp2eft-r2"
    assert json.loads((folder / "fedp2eft.json").read_text())["layout"] == "compact"
    evaluation = SHORT["evaluation"] | {"save_adapters": False}
    train(world.settings(**(SHORT | {"evaluation": evaluation})), tmp_path / "none")
    assert not (tmp_path / "none" / "adapters").exists()


def test_no_rounds_at_all(world: World, tmp_path: Path):
    """An untrained PSG on an untrained base is still a run."""
    psg = run(world, tmp_path / "run", base__rounds=0, federation__rounds=0)
    fresh = PSG(psg.config)
    assert all(torch.equal(a, b) for a, b in zip(psg.parameters(), fresh.parameters(), strict=True))


def test_the_debian_descriptions_and_a_new_language(world: World, tmp_path: Path):
    """The data set that ships with the package, three languages, one of them never trained on."""
    settings = world.settings(
        data={
            "dataset": "debian-descriptions", "languages": ["de", "fr"], "new_languages": ["pl"],
            "clients_per_language": 1, "max_train": 8, "max_test": 6,
        },
        base__rounds=1,
        federation__rounds=1,
        local__max_length=LENGTH,
        evaluation={"methods": ["base", "fedp2eft"], "ranks": [1], "pools": ["new-language"]},
    )  # fmt: skip
    results = train(settings, tmp_path / "run")
    assert {row.pool for row in results.rows} == {"new-language"}
    assert [list(row.languages) for row in results.rows] == [["pl"], ["pl"]]
