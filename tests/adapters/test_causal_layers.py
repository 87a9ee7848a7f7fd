"""BT-LoRA on the layers of several kinds of causal LMs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from fedp2eft.adapters.btlora import BTLora
from fedp2eft.adapters.budget import keep_largest
from fedp2eft.adapters.export import save_adapter
from fedp2eft.client.features import EPSILON
from fedp2eft.client.training import features, personalize
from fedp2eft.settings.experiment import AdapterSettings, LocalSettings
from fedp2eft.settings.profiles import PROFILES
from fedp2eft.tasks.causal_lm import CausalLM
from fedp2eft.tasks.encoded import Encoded
from tiny import VOCABULARY, disturb, random_lambda

SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
DECODERS = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "smollm2": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),  # biases on query, key and value
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {}),  # norms inside the attention
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig, {"sliding_window": 4}),
}
PER_BLOCK = {"gpt2": 4}
TASK = CausalLM(pad_id=0, max_length=16)
SETTINGS = AdapterSettings(r_max=3)
IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


def decoder(kind: str) -> nn.Module:
    torch.manual_seed(11)
    if kind == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=16)
        ).eval()
    model, config, more = DECODERS[kind]
    return model(config(**SHAPE | more)).eval()


def rows() -> Encoded:
    rng = np.random.default_rng(3)
    lengths, starts = (6, 9, 4, 8), (2, 5, 1, 4)
    ids = [rng.integers(3, VOCABULARY, size=n).tolist() for n in lengths]
    return Encoded.from_rows(ids, [0] * 4, starts=starts)


KINDS = [*DECODERS, "gpt2"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_linear_layer_but_the_output_head_is_adapted(kind: str):
    bt = BTLora(decoder(kind), SETTINGS)
    linears = [name for name, _ in bt.linears]
    assert len(bt.names) == 2 * PER_BLOCK.get(kind, 7)
    assert linears == [*bt.names, "lm_head"]
    assert not bt.model.get_output_embeddings().weight.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_the_gated_model_is_the_base_with_b_lambda_a_added(kind: str):
    bt = BTLora(decoder(kind), SETTINGS)
    lam = random_lambda(bt, seed=2)
    bt.reset(lam)
    disturb(bt, seed=5)
    with torch.no_grad():
        gated = bt.model(input_ids=IDS).logits
        plain = decoder(kind)
        for name, A, B, row in zip(bt.names, bt.A, bt.B, lam, strict=True):
            change = 2.0 * B @ torch.diag(row) @ A
            module = plain.get_submodule(name)
            module.weight += change if isinstance(module, nn.Linear) else change.T
        expected = plain(input_ids=IDS).logits
    torch.testing.assert_close(gated, expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad(), bt.model.disable_adapter():
        torch.testing.assert_close(
            bt.model(input_ids=IDS).logits, decoder(kind)(input_ids=IDS).logits
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["portable", "compact"])
def test_a_personalized_adapter_is_the_same_after_plain_peft_has_loaded_it(
    kind: str, layout: str, tmp_path: Path
):
    decoder(kind).save_pretrained(tmp_path / "base")
    bt, data = BTLora(decoder(kind), SETTINGS), rows()
    lam = random_lambda(bt, seed=2)
    local = LocalSettings(personalize_lr=1e-2, dropout=False)
    logits: list[torch.Tensor] = []

    def measure(model: nn.Module) -> None:
        with torch.no_grad():
            logits.append(model(input_ids=IDS).logits)

    order = [np.array([0, 1]), np.array([2, 3])] * 2
    fitted = personalize(bt, TASK, data, lam, keep_largest(lam, 1), order, local, measure=measure)
    assert fitted.losses[2] < fitted.losses[0]  # the same rows
    out = save_adapter(
        fitted.weights, tmp_path / "adapter", base=str(tmp_path / "base"), layout=layout,  # type: ignore[arg-type]
        task_type="CAUSAL_LM",
    )  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        again = PeftModel.from_pretrained(base, out).eval()(input_ids=IDS).logits
    torch.testing.assert_close(again, logits[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_output_head_is_adapted_where_it_is_asked_for(kind: str):
    names = {"llama": ["q_proj", "lm_head"], "gpt2": ["c_attn", "lm_head"]}[kind]
    bt = BTLora(decoder(kind), AdapterSettings(r_max=2, target_modules=names))
    assert bt.names[-1] == "lm_head"
    assert len(bt.names) == 3
    before = bt.model(input_ids=IDS).logits.detach()
    bt.reset(1.0)
    disturb(bt)
    assert not torch.allclose(bt.model(input_ids=IDS).logits, before)


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_of_prompt_and_response_without_padding(kind: str):
    """ξ against the inputs of every layer, row by row and without any padding."""
    bt, data = BTLora(decoder(kind), SETTINGS), rows()
    plain, heard = decoder(kind), {}
    linears = [(name, plain.get_submodule(name)) for name, _ in bt.linears]
    for name, module in linears:
        module.register_forward_pre_hook(
            lambda _m, x, name=name: heard.setdefault(name, []).append(x[0].flatten())
        )
    for row in range(len(data)):
        ids = data.tokens[data.offsets[row] : data.offsets[row + 1]]
        with torch.no_grad():
            plain(input_ids=torch.from_numpy(ids).long().unsqueeze(0))
    values = [torch.cat(heard[name]).double() for name, _ in linears]
    pairs = [(v.mean(), (v.var() + EPSILON).sqrt()) for v in values]
    expected = torch.tensor([float(number) for pair in pairs for number in pair])
    xi = features(bt, TASK, data, LocalSettings(eval_batch_size=3), PROFILES["paper"])
    torch.testing.assert_close(xi, expected, rtol=1e-4, atol=1e-5)
