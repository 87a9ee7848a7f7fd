"""An exported adapter computes what it was made of, or nothing is kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModel, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import fedp2eft
from fedp2eft.adapters import convert, export
from fedp2eft.adapters.btlora import BTLora
from fedp2eft.adapters.export import CONFIG_FILE, FACTS_FILE, save_adapter
from fedp2eft.errors import UserError
from fedp2eft.models.loading import load_base, stored_dtype
from fedp2eft.models.sources import resolve_model
from fedp2eft.settings.experiment import AdapterSettings
from tiny import disturb
from tiny_chat import save_llama
from tiny_run import World, write_jsonl

IDS = torch.arange(4, 16).reshape(2, 6)


def adapted(base: Path, out: Path, targets: list[str], scale: float = 0.1) -> Path:
    """A PEFT folder of a random adapter."""
    source = resolve_model(str(base))
    bt = BTLora(load_base(source, "causal_lm"), AdapterSettings(r_max=4, target_modules=targets))
    bt.reset(1.0)
    disturb(bt, scale=scale)
    return save_adapter(
        bt.trim(4), out, base=str(base), revision=source.revision, task_type="CAUSAL_LM"
    )


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def causal(folder: Path) -> AutoModelForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("tied") / "llama")


@pytest.mark.parametrize("changed", [None, "lm_head", "embed_tokens"])
def test_a_merged_model_computes_what_base_and_adapter_do(llama: Path, tmp_path, changed):
    adapter = adapted(llama, tmp_path / "adapter", ["q_proj", *([changed] if changed else [])])
    wanted = logits(PeftModel.from_pretrained(causal(llama), adapter))
    fedp2eft.export(adapter, tmp_path / "merged", "merged")
    torch.testing.assert_close(logits(causal(tmp_path / "merged")), wanted, atol=1e-5, rtol=0)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["tie_word_embeddings"] == (changed is None)  # no larger than it has to be


def test_what_computes_something_else_is_not_kept(llama: Path, tmp_path, monkeypatch):
    adapter = adapted(llama, tmp_path / "adapter", ["q_proj", "lm_head"])
    monkeypatch.setattr(convert, "untie", lambda model, weights: None)
    with pytest.raises(UserError, match=r"merged \(merged\) differs from base and adapter by"):
        fedp2eft.export(adapter, tmp_path / "merged", "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize(("layout", "damage"), [("portable", 1.0), ("compact", float("nan"))])
def test_every_layout_is_compared(llama: Path, tmp_path, monkeypatch, layout, damage):
    adapter = adapted(llama, tmp_path / "adapter", ["q_proj"])
    real, calls = convert.outputs_on, []

    def damaged(model, rows):
        calls.append(model)
        return real(model, rows) + (damage if len(calls) == 3 else 0.0)

    monkeypatch.setattr(convert, "outputs_on", damaged)
    with pytest.raises(UserError, match=rf"other \({layout}\) differs from base and adapter"):
        fedp2eft.export(adapter, tmp_path / "other", layout)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_an_adapter_that_does_not_read_back_is_not_kept(llama: Path, tmp_path, monkeypatch):
    def half(tensors, path, metadata):
        save_file({key: value * 0.5 for key, value in tensors.items()}, path, metadata)

    monkeypatch.setattr(export, "save_file", half)
    with pytest.raises(UserError, match="would not hold the adapter"):
        adapted(llama, tmp_path / "adapter", ["q_proj"])
    assert list(tmp_path.iterdir()) == []


def test_a_peft_layout_needs_no_base_and_says_so(llama: Path, tmp_path, caplog):
    adapter = adapted(llama, tmp_path / "adapter", ["q_proj"])
    with caplog.at_level("INFO"):
        fedp2eft.export(adapter, tmp_path / "compact", "compact", str(tmp_path / "gone"))
    assert "only the weights are compared" in caplog.text
    assert (tmp_path / "compact" / CONFIG_FILE).exists()


def test_a_merged_model_keeps_the_bases_dtype_unless_told_otherwise(llama: Path, tmp_path):
    half = tmp_path / "half"
    fedp2eft.export(adapted(llama, tmp_path / "a", ["q_proj"]), half, "merged", precision="bf16")
    adapter = adapted(half, tmp_path / "b", ["q_proj"])
    fedp2eft.export(adapter, tmp_path / "same", "merged")
    fedp2eft.export(adapter, tmp_path / "full", "merged", precision="fp32")
    found = [stored_dtype(resolve_model(str(tmp_path / name))) for name in ("same", "full")]
    assert found == [torch.bfloat16, torch.float32]
    told = json.loads((tmp_path / "same" / "config.json").read_text())["dtype"]
    assert told == "bfloat16"
    wanted = logits(PeftModel.from_pretrained(causal(half), adapter))
    torch.testing.assert_close(logits(causal(tmp_path / "full")), wanted, atol=1e-5, rtol=0)


def test_an_adapter_that_rounding_would_lose_is_not_merged(llama: Path, tmp_path):
    adapter = adapted(llama, tmp_path / "adapter", ["q_proj"], scale=1e-3)
    with pytest.raises(UserError, match=r"lose the adapter in the rounding.*--precision fp32"):
        fedp2eft.export(adapter, tmp_path / "merged", "merged", precision="bf16")
    assert not (tmp_path / "merged").exists()
    fedp2eft.export(adapter, tmp_path / "merged", "merged")


def test_auto_peft_model_loads_a_runs_adapter(finished, tmp_path):
    adapter = finished.folder / "adapters" / "fr-unseen-00" / "fedp2eft-r2"
    fedp2eft.export(adapter, tmp_path / "compact", "compact")
    base = AutoModelForSequenceClassification.from_pretrained(finished.folder / "base")
    wanted = logits(PeftModel.from_pretrained(base, adapter))
    for folder in (adapter, tmp_path / "compact"):
        model = AutoPeftModel.from_pretrained(folder)
        torch.testing.assert_close(logits(model), wanted, atol=1e-6, rtol=0)
    assert load_file(adapter / export.WEIGHTS_FILE)


def test_an_adapter_for_other_classes_is_refused(finished, world: World, tmp_path):
    """The same weights under other names: the hash of the weights does not tell."""
    adapter = finished.folder / "adapters" / "fr-unseen-00" / "fedp2eft-r2"
    (tmp_path / "other").mkdir()
    for file in adapter.iterdir():
        (tmp_path / "other" / file.name).write_bytes(file.read_bytes())
    facts = json.loads((adapter / FACTS_FILE).read_text()) | {"labels": ["stone", "plant", "ape"]}
    (tmp_path / "other" / FACTS_FILE).write_text(json.dumps(facts))
    data = write_jsonl(tmp_path / "rows.jsonl", world.client_rows("fr-unseen-00", "test"))
    with pytest.raises(UserError, match=r"classes stone, plant, ape, and .* animal, plant, stone"):
        fedp2eft.evaluate(finished.folder / "base", data, tmp_path / "other")
