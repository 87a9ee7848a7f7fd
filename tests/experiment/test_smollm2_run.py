"""A whole run with the real SmolLM2 on a few real rows, and its adapter in plain PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedp2eft.experiment.train import train
from fedp2eft.models.offline.gguf import SMOLLM2
from fedp2eft.models.sources import ModelSource
from fedp2eft.results.rows import Results
from fedp2eft.settings.reading import settings_from

NEW = 8
CLIENT = "en_US-unseen-00"
RAW: dict[str, dict[str, Any]] = {
    "data": {
        "dataset": "libreoffice-help", "languages": ["en_US"], "clients_per_language": 1,
        "max_train": 2, "max_test": 1,
    },
    "model": {
        "name": SMOLLM2.hub_name, "task": "causal_lm", "precision": "fp32", "device": "cpu",
    },
    "base": {"kind": "off-the-shelf"},
    "adapter": {"r_max": 4},
    "generator": {"init_lambda": 0.5, "hidden_multiplier": 1, "lr": 1e-3, "steps": 2},
    "local": {
        "epochs": 1, "batch_size": 2, "lr": 1e-3, "lambda_lr": 0.1, "personalize_lr": 1e-2,
        "personalize_epochs": 2, "dropout": False, "max_length": 64, "eval_batch_size": 2,
    },
    "federation": {"rounds": 1, "clients_per_round": 1},
    "evaluation": {
        "methods": ["base", "fedp2eft"], "ranks": [2], "pools": ["unseen"], "generate": True,
        "max_new_tokens": NEW,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def run(smollm2: ModelSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2") / "run"
    assert isinstance(train(settings_from(RAW), folder), Results)
    return folder


def kept(run: Path, method: str) -> list[dict[str, str]]:
    path = run / "generations" / method / f"{CLIENT}.json"
    rows: list[dict[str, str]] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return rows


def cell(run: Path, method: str) -> dict[str, Any]:
    path = run / "cells" / method / f"{CLIENT}.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def test_the_run_scores_and_writes_before_and_after(run: Path) -> None:
    before, after = cell(run, "base-r0"), cell(run, "fedp2eft-r2")
    assert before["examples"] == after["examples"] == 1
    assert before["tokens"] == after["tokens"]
    assert after["parameters"] > 0
    assert abs(after["loss"] - before["loss"]) > 1e-3
    [row] = kept(run, "base-r0")
    assert row["generated"]
    [other] = kept(run, "fedp2eft-r2")
    assert other["prompt"] == row["prompt"]
    assert other["generated"] not in ("", row["generated"])
    assert {"rouge1", "rouge2", "rougeL", "chrf"} <= set(before) & set(after)


def test_the_portable_adapter_writes_the_same_with_plain_peft(run: Path) -> None:
    folder = run / "adapters" / CLIENT / "fedp2eft-r2"
    tokenizer = AutoTokenizer.from_pretrained(run / "base")
    plain = AutoModelForCausalLM.from_pretrained(run / "base")
    model = PeftModel.from_pretrained(plain, folder).eval()
    for method, adapted in (("fedp2eft-r2", True), ("base-r0", False)):
        if not adapted:
            model = model.unload().eval()
        for row in kept(run, method):
            turns = [{"role": "user", "content": row["prompt"]}]
            inputs = tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            with torch.no_grad():
                made = model.generate(**inputs, do_sample=False, max_new_tokens=NEW)
            said = made[0, inputs["input_ids"].shape[1] :]
            assert tokenizer.decode(said, skip_special_tokens=True).strip() == row["generated"]
