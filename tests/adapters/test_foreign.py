"""Adapters that PEFT wrote by itself: what can be checked is, and one line says what cannot."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import fedp2eft
from fedp2eft.errors import UserError
from tiny_chat import save_llama
from tiny_run import World, write_jsonl


def foreign(base: Path, out: Path, **options: object) -> Path:
    """PEFT's own folder of a LoRA whose B is not zero."""
    causal = options.get("task_type") == "CAUSAL_LM"
    auto = AutoModelForCausalLM if causal else AutoModelForSequenceClassification
    torch.manual_seed(2)
    model = get_peft_model(
        auto.from_pretrained(base), LoraConfig(init_lora_weights=False, r=2, **options)
    )
    model.save_pretrained(out)
    return out


@pytest.fixture
def rows(world: World, tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "rows.jsonl", world.client_rows("fr-unseen-00", "test"))


def test_it_scores_as_peft_computes_it_and_one_line_says_what_is_not_known(
    finished, rows: Path, tmp_path: Path, caplog
):
    base = finished.folder / "base"
    adapter = foreign(
        base, tmp_path / "a", lora_alpha=4, target_modules=["query"], task_type="SEQ_CLS"
    )
    scores = fedp2eft.evaluate(base, rows, adapter, precision="fp32")
    [said] = [message for message in caplog.messages if "fedp2eft.json" in message]
    assert "only the names and sizes of its layers are compared" in said
    assert str(base) in said
    merged = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(base), adapter
    ).merge_and_unload()
    shutil.copytree(base, tmp_path / "merged")
    merged.save_pretrained(tmp_path / "merged")
    again = fedp2eft.evaluate(tmp_path / "merged", rows, precision="fp32")
    assert scores.loss == pytest.approx(again.loss, rel=1e-5)
    assert scores.loss != pytest.approx(fedp2eft.evaluate(base, rows, precision="fp32").loss)


def test_one_whose_layers_are_others_is_refused(finished, rows: Path, tmp_path: Path):
    base = finished.folder / "base"
    adapter = foreign(base, tmp_path / "a", target_modules=["query"])
    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    first = sorted(weights)[0]
    save_file({k: v for k, v in weights.items() if k != first}, file)
    with pytest.raises(UserError, match="damaged or does not fit this base model"):
        fedp2eft.evaluate(base, rows, adapter)
    save_file(weights | {first: torch.zeros(2, 3)}, file)
    with pytest.raises(UserError, match="damaged or does not fit this base model"):
        fedp2eft.evaluate(base, rows, adapter)


def test_one_of_the_other_task_is_refused(finished, rows: Path, tmp_path: Path):
    base = finished.folder / "base"
    adapter = foreign(base, tmp_path / "a", target_modules=["query"], task_type="SEQ_CLS")
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"task_type": "CAUSAL_LM"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"PEFT's task type CAUSAL_LM.*give target_column"):
        fedp2eft.evaluate(base, rows, adapter)


def test_an_embedding_that_peft_saves_beside_its_adapter_is_no_odd_weight(tmp_path: Path):
    base = save_llama(tmp_path / "llama")
    adapter = foreign(
        base, tmp_path / "a", target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM"
    )
    held = load_file(adapter / "adapter_model.safetensors")
    assert any("lora" not in name for name in held)
    data = write_jsonl(tmp_path / "rows.jsonl", [{"text": "le chat", "answer": "le petit chat"}])
    scores = fedp2eft.evaluate(base, data, adapter, target_column="answer", max_length=16)
    assert scores.loss != fedp2eft.evaluate(base, data, target_column="answer", max_length=16).loss


@pytest.mark.parametrize(
    ("options", "odd"),
    [
        ({"lora_alpha": 4}, "of a scale that is not 1"),
        ({"lora_alpha": 2, "use_rslora": True}, "with use_rslora"),
        ({"lora_alpha": 2, "use_dora": True}, "with use_dora"),
    ],
)
def test_what_is_more_than_the_product_of_b_and_a_is_not_exported(finished, tmp_path, options, odd):
    adapter = foreign(finished.folder / "base", tmp_path / "a", target_modules=["query"], **options)
    for layout in ("compact", "merged"):
        with pytest.raises(UserError, match=f"{odd}, and export takes those that fedp2eft writes"):
            fedp2eft.export(adapter, tmp_path / "out", layout)
    assert not (tmp_path / "out").exists()


def test_plain_lora_is_exported_and_compared(finished, tmp_path: Path, caplog):
    base = finished.folder / "base"
    adapter = foreign(base, tmp_path / "a", target_modules=["query"], lora_alpha=2)
    fedp2eft.export(adapter, tmp_path / "out", "compact")
    assert len([message for message in caplog.messages if "fedp2eft.json" in message]) == 1
    ids = torch.arange(4, 12).reshape(1, 8)
    found = []
    for folder in (adapter, tmp_path / "out"):
        model = AutoModelForSequenceClassification.from_pretrained(base)
        with torch.no_grad():
            found.append(PeftModel.from_pretrained(model, folder).eval()(input_ids=ids).logits)
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=0)


def test_an_adapter_goes_with_one_of_two_bases_of_the_same_name(
    finished, rows: Path, tmp_path: Path, monkeypatch
):
    """adapter_config.json says `base`, and each of two run folders has one."""
    made = finished.folder / "adapters" / "fr-unseen-00" / "fedp2eft-r2"
    for name in ("a", "b"):
        shutil.copytree(finished.folder / "base", tmp_path / name / "base")
        shutil.copytree(made, tmp_path / name / "adapter")
        file = tmp_path / name / "adapter" / "adapter_config.json"
        config = json.loads(file.read_text()) | {"base_model_name_or_path": "base"}
        file.write_text(json.dumps(config))
    file = tmp_path / "b" / "base" / "model.safetensors"
    weights = load_file(file)
    weights["classifier.bias"] += 1
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="was made for another base model"):
        fedp2eft.evaluate(tmp_path / "b" / "base", rows, tmp_path / "a" / "adapter")
    monkeypatch.chdir(tmp_path / "b")  # where `base` is the other one
    with pytest.raises(UserError, match="was made for another base model"):
        fedp2eft.export(tmp_path / "a" / "adapter", tmp_path / "out", "merged")
    assert not (tmp_path / "out").exists()
    monkeypatch.chdir(tmp_path / "a")
    fedp2eft.export(tmp_path / "a" / "adapter", tmp_path / "out", "merged")
