"""Bases in 8 and 4 bits, and gradient checkpointing: loaded, trained on, exported."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fedp2eft.adapters.btlora import BTLora
from fedp2eft.adapters.export import save_adapter
from fedp2eft.client.cohort import why_alone
from fedp2eft.client.training import features, personalize, stage1
from fedp2eft.errors import UserError
from fedp2eft.models.loading import load_base
from fedp2eft.models.sources import ModelSource
from fedp2eft.runtime.workspace import Workspace
from fedp2eft.settings.experiment import AdapterSettings, LocalSettings
from fedp2eft.settings.profiles import PROFILES
from fedp2eft.tasks.causal_lm import CausalLM
from fedp2eft.tasks.encoded import Encoded
from tiny import random_lambda
from tiny_chat import LENGTH, make_chat_world, save_llama

TASK = CausalLM(pad_id=3, max_length=LENGTH)
SETTINGS = AdapterSettings(r_max=2)
LOCAL = LocalSettings(lr=1e-2, lambda_lr=0.1, personalize_lr=2e-2, alpha_s=0.0, dropout=False)
PAPER = PROFILES["paper"]
ORDER = [np.array([0, 1]), np.array([2, 3])] * 2
needs_bits = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="no bitsandbytes")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    folder = tmp_path_factory.mktemp("quantized") / "base"
    save_llama(folder, width=128)  # blocks of 64 weights share a scale
    return ModelSource(str(folder), str(folder), "sha256:0")


def rows() -> Encoded:
    rng = np.random.default_rng(3)
    ids = [rng.integers(8, 20, size=n).tolist() for n in (6, 9, 4, 8)]
    return Encoded.from_rows(ids, [0] * 4, starts=[2, 5, 1, 4])


@needs_bits
@pytest.mark.parametrize(("bits", "kind"), [("4bit", "Linear4bit"), ("8bit", "Linear8bitLt")])
def test_an_adapter_of_a_quantized_base_loads_on_a_16_bit_one(
    source: ModelSource, tmp_path: Path, bits: str, kind: str
):
    base = load_base(source, "causal_lm", quantize=bits)  # type: ignore[arg-type]
    layer = base.model.layers[0].mlp.down_proj
    assert type(layer).__name__ == kind
    assert not any(p.requires_grad for p in base.parameters())
    assert {p.dtype for p in base.parameters() if p.is_floating_point()} == {torch.float32}
    bt, data = BTLora(base, SETTINGS), rows()
    plain = BTLora(load_base(source, "causal_lm"), SETTINGS)
    assert [name for name, _ in bt.linears] == [name for name, _ in plain.linears]
    assert bt.names == plain.names
    assert "4bit" in why_alone(bt, LOCAL) or "8bit" in why_alone(bt, LOCAL)  # type: ignore[operator]
    xi, exact = (features(b, TASK, data, LOCAL, PAPER) for b in (bt, plain))
    torch.testing.assert_close(xi, exact, rtol=0.1, atol=0.1)  # up to the rounding of the base

    bt.reset(0.5)
    losses = stage1(bt, TASK, data, ORDER, LOCAL, PAPER)
    assert losses[2] < losses[0]
    lam = random_lambda(bt, seed=1)
    keep = torch.zeros_like(lam, dtype=torch.bool)
    keep[:, 0] = True
    fitted = personalize(bt, TASK, data, lam, keep, ORDER * 3, LOCAL)
    out = save_adapter(
        fitted.weights, tmp_path / "adapter", base=source.path, task_type="CAUSAL_LM"
    )
    half = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.bfloat16).eval()
    before = TASK.score(half, data, 4).loss
    there = PeftModel.from_pretrained(half, out, autocast_adapter_dtype=True).eval()
    assert TASK.score(there, data, 4).loss < before - 0.1  # it helps there too
    for layer in fitted.weights.layers:
        module = there.get_submodule(f"base_model.model.{layer.name}")
        expected = 2.0 * layer.B @ torch.diag(layer.lam) @ layer.A
        torch.testing.assert_close(module.get_delta_weight("default"), expected)


@needs_bits
def test_the_settings_quantize_the_base_that_adapters_sit_on(tmp_path: Path):
    world = make_chat_world(tmp_path)
    workspace = Workspace(world.settings(model__quantize="4bit"))
    assert type(workspace.bt.linears[0][1]).__name__ == "Linear4bit"
    assert type(workspace.trainable_base.model.layers[0].mlp.up_proj) is torch.nn.Linear


def test_quantizing_without_bitsandbytes_is_one_line(
    source: ModelSource, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr("fedp2eft.models.loading.find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"pip install 'fedp2eft\[quantized\]'"):
        load_base(source, "causal_lm", quantize="4bit")


@pytest.mark.parametrize("dropout", [False, True])
def test_gradient_checkpointing_computes_blocks_twice_and_changes_no_number(
    source: ModelSource, dropout: bool
):
    local = LocalSettings(lr=1e-2, lambda_lr=0.1, dropout=dropout)
    found, calls = [], []
    for checkpointing in (False, True):
        base = load_base(source, "causal_lm", gradient_checkpointing=checkpointing)
        bt, count = BTLora(base, SETTINGS), [0]
        bt.reset(0.5)

        def counted(*_: object, count: list[int] = count) -> None:
            count[0] += 1

        base.model.layers[0].mlp.register_forward_pre_hook(counted)
        losses = stage1(bt, TASK, rows(), ORDER, local, PAPER)
        found.append((losses, torch.cat([B.detach().flatten() for B in bt.B]), bt.lam.detach()))
        calls.append(count[0])
        assert not bt.model.training
    assert calls == [4, 8]
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    for one, other in zip(found[0][1:], found[1][1:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_a_checkpointed_model_trains_alone_and_without_dropout_it_must_have_none(tmp_path: Path):
    world = make_chat_world(tmp_path)
    quiet = {"model__gradient_checkpointing": True, "local__dropout": False}
    workspace = Workspace(world.settings(**quiet))
    assert why_alone(workspace.bt, workspace.settings.local) == "gradient checkpointing is on"
    model = AutoModelForCausalLM.from_pretrained(world.encoder)
    model.config.attention_dropout = 0.1
    model.save_pretrained(world.encoder)
    with pytest.raises(UserError, match=r"set local\.dropout to true"):
        _ = Workspace(world.settings(**quiet)).bt
    _ = Workspace(world.settings(model__gradient_checkpointing=True)).bt
