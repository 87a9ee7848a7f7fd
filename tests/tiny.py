"""Tiny random models and rows, made in memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    CamembertConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    RobertaConfig,
    XLMRobertaConfig,
)

from fedp2eft.adapters.btlora import BTLora
from fedp2eft.generator import PSG, PSGConfig
from fedp2eft.settings.experiment import AdapterSettings, GeneratorSettings
from fedp2eft.tasks.classification import Classification
from fedp2eft.tasks.encoded import Encoded

VOCABULARY, LONGEST, CLASSES = 40, 16, 3
TASK = Classification(pad_id=0, max_length=LONGEST)
_LIKE_ROBERTA = {
    "roberta": RobertaConfig, "xlm-roberta": XLMRobertaConfig, "camembert": CamembertConfig,
}  # fmt: skip
ENCODERS = ["bert", *_LIKE_ROBERTA]


def tiny(kind: str, dropout: float = 0.1, width: int = 16):
    """A "bert" classifier, or a "gpt2" or "llama" language model; the same weights every time."""
    torch.manual_seed(7)
    if kind == "bert":
        return BertForSequenceClassification(
            BertConfig(
                vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=2,
                num_attention_heads=2, intermediate_size=3 * width // 2,
                max_position_embeddings=LONGEST, num_labels=CLASSES,
                hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
            )
        )  # fmt: skip
    if kind == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCABULARY, n_embd=width, n_layer=2, n_head=2, n_positions=LONGEST,
                resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
                bos_token_id=0, eos_token_id=0,
            )
        )  # fmt: skip
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=width, intermediate_size=3 * width // 2,
            num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


def classifier(kind: str, attention: str = "eager") -> PreTrainedModel:
    """A classifier of one of `ENCODERS` in float64 without dropout."""
    if kind == "bert":
        model = tiny("bert", dropout=0.0)
    else:
        torch.manual_seed(3)
        config = _LIKE_ROBERTA[kind](
            vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=24, max_position_embeddings=LONGEST + 2, num_labels=CLASSES,
            pad_token_id=0, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        model = AutoModelForSequenceClassification.from_config(config)
    model.set_attn_implementation(attention)
    return model.double()


def tiny_rows(lengths: Sequence[int], seed: int = 0) -> Encoded:
    """Rows of random tokens with random labels."""
    rng = np.random.default_rng(seed)
    rows = [rng.integers(1, VOCABULARY, size=length).tolist() for length in lengths]
    return Encoded.from_rows(rows, rng.integers(0, CLASSES, size=len(lengths)))


def tiny_psg(bt: BTLora, generator: GeneratorSettings | None = None, **facts: object) -> PSG:
    """An untrained PSG for an adapted model."""
    names = {
        "base_model": "tiny",
        "base_revision": "1",
        "linear_names": tuple(name for name, _ in bt.linears),
        "layer_names": bt.names,
    }
    return PSG(
        PSGConfig(adapter=bt.settings, generator=generator or GeneratorSettings(), **names | facts)
    )


def disturb(bt: BTLora, seed: int = 0, scale: float = 0.3) -> None:
    """Put random numbers into B, so that the adapter does something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for B in bt.B:
            B.add_(torch.randn(B.shape, generator=generator) * scale)


def random_lambda(bt: BTLora, seed: int = 0, low: float = 0.2, high: float = 2.0) -> Tensor:
    """λ inside its range, L × r_max."""
    generator = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(len(bt.names), bt.settings.r_max, generator=generator)


def double_adapter(kind: str = "bert", settings: AdapterSettings | None = None) -> BTLora:
    """An adapted model in float64 without dropout: rounding cannot blur a comparison of steps."""
    settings = settings or AdapterSettings(r_max=4)
    bt = BTLora(tiny(kind, dropout=0.0).double(), settings)
    bt.lam.data = bt.lam.data.double()
    return bt
