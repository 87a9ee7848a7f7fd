"""Every layout gives the logits that the model gave in memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedp2eft.adapters.btlora import BTLora
from fedp2eft.adapters.export import load_adapter, save_adapter
from fedp2eft.adapters.weights import AdapterWeights
from fedp2eft.errors import UserError
from fedp2eft.settings.experiment import AdapterSettings
from tiny import tiny
from tiny_run import plain_python

IDS = torch.arange(1, 13).reshape(2, 6)

KINDS = ("bert", "gpt2", "llama", "gpt2+wte")
LAYOUTS = ("portable", "compact")

PLAIN_PEFT = """
import sys, json, torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoModelForCausalLM
found = []
for kind, base, adapter in json.loads(sys.argv[1]):
    auto = AutoModelForSequenceClassification if kind == "bert" else AutoModelForCausalLM
    model = PeftModel.from_pretrained(auto.from_pretrained(base), adapter).eval()
    with torch.no_grad():
        logits = model(input_ids=torch.arange(1, 13).reshape(2, 6)).logits
    found.append(logits.double().tolist())
print(json.dumps(found))
"""

Personalized = tuple[str, Path, AdapterWeights, torch.Tensor]


def personalize(name: str, folder: Path) -> Personalized:
    """A tiny model with a trimmed adapter whose ranks differ by layer, and its logits."""
    kind, _, extra = name.partition("+")
    base = tiny(kind)
    base.save_pretrained(folder / "base")
    targets: str | list[str] = ["c_attn", "c_proj", extra] if extra else "all-linear"
    bt = BTLora(base, AdapterSettings(r_max=4, target_modules=targets))
    generator = torch.Generator().manual_seed(1)
    lam = torch.rand(len(bt.names), 4, generator=generator) + 0.1
    keep = torch.rand(lam.shape, generator=generator) < 0.4
    keep[0] = False  # a layer without ranks
    keep[-1] = True
    with bt.trimmed(lam, keep) as trimmed:
        with torch.no_grad():
            for parameter in trimmed.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
        bt.model.eval()
        with torch.no_grad():
            logits = bt.model(input_ids=IDS).logits.double()
        weights = trimmed.weights()
    with torch.no_grad(), bt.model.disable_adapter():
        untouched = bt.model(input_ids=IDS).logits.double()
    assert (logits - untouched).abs().max() > 0.05
    return kind, folder, weights, logits


@pytest.fixture(scope="module")
def all_personalized(tmp_path_factory) -> dict[str, Personalized]:
    return {name: personalize(name, tmp_path_factory.mktemp("model")) for name in KINDS}


@pytest.fixture(params=KINDS)
def personalized(request, all_personalized) -> Personalized:
    return all_personalized[request.param]


@pytest.fixture(scope="module")
def plain_logits(all_personalized) -> dict[tuple[Path, str], torch.Tensor]:
    """What plain PEFT makes of every layout of every model, in one other process."""
    asked = [(one, layout) for one in all_personalized.values() for layout in LAYOUTS]
    given = []
    for (kind, folder, weights, _), layout in asked:
        base = str(folder / "base")
        adapter = save_adapter(weights, folder / layout, base=base, layout=layout)
        given.append((kind, base, str(adapter)))
    found = json.loads(plain_python(PLAIN_PEFT, json.dumps(given)))
    return {
        (one[1], layout): torch.tensor(logits, dtype=torch.float64)
        for (one, layout), logits in zip(asked, found, strict=True)
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_plain_peft_gives_the_same_logits(personalized, layout, plain_logits) -> None:
    _, folder, _, logits = personalized
    assert torch.allclose(plain_logits[folder, layout], logits, atol=1e-5, rtol=0)


def test_vllm_rule_gives_the_same_logits(personalized) -> None:
    """One scale (lora_alpha / r) for all modules, patterns ignored, missing modules allowed."""
    kind, folder, weights, logits = personalized
    adapter = save_adapter(weights, folder / "vllm", base=str(folder / "base"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    scale = config["lora_alpha"] / config["r"]
    model = tiny(kind).eval()
    with torch.no_grad():
        for key in [k for k in tensors if "lora_A" in k or "lora_embedding_A" in k]:
            A, B = tensors[key], tensors[key.replace("_A", "_B")]
            assert A.shape[0] == B.shape[1] == config["r"]
            name = key.removeprefix("base_model.model.").split(".lora_")[0]
            weight = model.get_submodule(name).weight
            delta = scale * B @ A
            weight.add_(delta if delta.shape == weight.shape and kind != "gpt2" else delta.T)
        got = model(input_ids=IDS).logits.double()
    assert torch.allclose(got, logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reading_back_keeps_the_true_ranks(personalized, layout) -> None:
    _, folder, weights, _ = personalized
    adapter = save_adapter(weights, folder / f"again-{layout}", base="b", layout=layout)
    read = {name: rank for name, rank in load_adapter(adapter).ranks.items() if rank}
    assert read == {name: rank for name, rank in weights.ranks.items() if rank}


def test_nan_is_not_saved(personalized, tmp_path) -> None:
    _, _, weights, _ = personalized
    weights.layers[-1].A[0, 0], before = torch.nan, weights.layers[-1].A[0, 0].clone()
    try:
        with pytest.raises(UserError, match="NaN"):
            save_adapter(weights, tmp_path / "a", base="b")
    finally:
        weights.layers[-1].A[0, 0] = before
    assert list(tmp_path.iterdir()) == []


def test_foreign_folder_is_not_replaced(personalized, tmp_path) -> None:
    _, _, weights, _ = personalized
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not an adapter folder"):
        save_adapter(weights, tmp_path, base="b")
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
