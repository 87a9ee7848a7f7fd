"""Causal LMs without padding, logits at responses alone: loss, gradients, scores of padded rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from fedp2eft.adapters.btlora import BTLora
from fedp2eft.client.descent import rows_loss
from fedp2eft.settings.experiment import AdapterSettings
from fedp2eft.tasks import packed
from fedp2eft.tasks.causal_lm import CausalLM
from fedp2eft.tasks.encoded import Encoded
from fedp2eft.tasks.frozen_blocks import DECODERS
from fedp2eft.tasks.packed import shared_tokens
from tiny import LONGEST, VOCABULARY, disturb, tiny, tiny_rows

TASK = CausalLM(pad_id=0, max_length=LONGEST, vocabulary=VOCABULARY)
ROWS = np.array([6, 1, 0, 2, 3, 7, 5])


def causal_rows(lengths: list[int], seed: int = 0) -> Encoded:
    data = tiny_rows(lengths, seed)
    starts = np.random.default_rng(seed).integers(0, data.lengths)
    return replace(data, starts=starts, labels=np.zeros_like(data.labels))


def beginning_alike(data: Encoded, tokens: int) -> Encoded:
    """The rows with the same so many tokens before each."""
    same = [int(token) for token in np.arange(tokens) % 7 + 1]
    rows = [same + row.tolist() for row in np.split(data.tokens, data.offsets[1:-1])]
    return Encoded.from_rows(rows, data.labels, starts=data.starts + tokens)


DATA = causal_rows([5, 14, 3, 5, 14, 6, 13, 2])
ALIKE = beginning_alike(causal_rows([5, 9, 3, 5, 9, 6, 8, 2]), 5)


def decoder(kind: str, attention: str = "eager") -> nn.Module:
    """Two key heads, each of which two query heads share."""
    torch.manual_seed(3)
    config = AutoConfig.for_model(
        kind, vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4, intermediate_size=24, pad_token_id=0,
        max_position_embeddings=LONGEST, initializer_range=0.3,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    model.set_attn_implementation(attention)
    return model.double().eval()


@pytest.mark.parametrize("data", [DATA, ALIKE], ids=["any rows", "rows that begin alike"])
@pytest.mark.parametrize("block_tokens", [0, 4, 1000])  # rows of one length, of some, all rows
@pytest.mark.parametrize("kind", DECODERS)
def test_loss_and_every_gradient_are_those_of_padded_rows(
    kind: str, block_tokens: int, data: Encoded, monkeypatch
) -> None:
    monkeypatch.setattr(packed, "BLOCK_TOKENS", block_tokens)
    bt = BTLora(decoder(kind), AdapterSettings(r_max=4))
    bt.lam.data = bt.lam.data.double()
    bt.reset(0.5)
    disturb(bt)
    leaves, found = [*bt.A, *bt.B, bt.lam], []
    loss_of = TASK.packed_loss(bt.model, data)
    assert loss_of is not None
    for loss in (loss_of(ROWS), TASK.loss(bt.model, TASK.batch(data, ROWS))):
        found.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for mine, whole in zip(*found, strict=True):
        torch.testing.assert_close(mine, whole, rtol=1e-5, atol=1e-6)  # norms are float32
    assert max(float(gradient.abs().max()) for gradient in found[0][1:]) > 1e-3


@pytest.mark.parametrize("kind", DECODERS)
def test_under_autocast_packed_rows_have_the_loss_of_padded_ones(kind: str) -> None:
    """As the base itself is trained in bf16: rotary embeddings make queries and keys fp32 again."""
    model = decoder(kind).float()
    found = []
    loss_of = TASK.packed_loss(model, ALIKE)
    assert loss_of is not None
    for loss_at in (lambda: loss_of(ROWS), lambda: TASK.loss(model, TASK.batch(ALIKE, ROWS))):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_at()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        found.append((loss.item(), torch.cat([each.flatten() for each in gradients])))
    (mine, gradient), (whole, expected) = found
    assert mine == pytest.approx(whole, rel=0.01)
    assert float((gradient - expected).norm() / expected.norm()) < 0.05


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(2, LONGEST), min_size=1, max_size=12),
    seed=st.integers(0, 99),
    most=st.sampled_from([1, 20, 1000]),
    alike=st.integers(0, 4),
    block_tokens=st.sampled_from([2, 32]),
)
def test_any_rows_score_as_padded_ones(
    lengths: list[int], seed: int, most: int, alike: int, block_tokens: int
) -> None:
    own = [min(length, LONGEST - alike) for length in lengths]
    model, data = decoder("llama"), beginning_alike(causal_rows(own, seed), alike)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(packed, "BLOCK_TOKENS", block_tokens)
        patch.setattr(CausalLM, "most_tokens", most)
        loss_of, parts_of = rows_loss(TASK, model, data)
        assert parts_of is not None
        mine = sum(loss_of(part) * share for part, share in parts_of(np.arange(len(data))))
        sums, tokens = TASK.losses(model, data, 3)
        patch.setattr(CausalLM, "_packs", lambda *_: False)
        padded, counts = TASK.losses(model, data, 3)
    torch.testing.assert_close(sums, padded, rtol=1e-5, atol=1e-5)
    assert torch.equal(tokens, counts)
    torch.testing.assert_close(float(mine), float(padded.sum() / counts.sum()), rtol=1e-5, atol=0)


def test_the_head_is_asked_at_response_tokens_alone() -> None:
    model, seen = decoder("llama"), []
    model.lm_head.register_forward_pre_hook(lambda _m, args: seen.append(args[0].shape[1]))
    loss_of = TASK.packed_loss(model, DATA)
    assert loss_of is not None
    loss_of(ROWS)
    TASK.losses(model, DATA, 100)
    assert seen == [DATA.weights(ROWS).sum(), DATA.weights(np.arange(len(DATA))).sum()]


def test_tokens_that_all_rows_begin_with_are_computed_once(monkeypatch) -> None:
    model, seen = decoder("llama"), []
    model.model.embed_tokens.register_forward_pre_hook(lambda _m, a: seen.append(a[0].numel()))
    loss_of = TASK.packed_loss(model, ALIKE)
    assert loss_of is not None
    tokens = int(ALIKE.lengths[ROWS].sum())
    loss_of(ROWS)
    assert seen.pop() == tokens  # 4 · 6 positions are fewer than a block of attention costs
    monkeypatch.setattr(packed, "BLOCK_TOKENS", 24)
    loss_of(ROWS)
    assert seen.pop() == tokens - 24
    # With dropout, each row draws a mask of its own at every token.
    model.model.layers[0].mlp.act_fn = nn.Sequential(nn.Dropout(0.1), nn.SiLU())
    loss_of(ROWS)
    assert seen.pop() == tokens - 24
    model.train()
    loss_of(ROWS)
    assert seen.pop() == tokens


def test_how_many_tokens_rows_begin_with_alike(monkeypatch) -> None:
    monkeypatch.setattr(packed, "BLOCK_TOKENS", 1)
    rows = [[1, 2, 3, 4, 5, 6], [1, 2, 3, 9, 9], [1, 2, 3, 4, 5, 6]]
    data = Encoded.from_rows(rows, [0] * 3, starts=[5, 4, 5])
    assert shared_tokens(data, [0, 1, 2]) == 3
    # The same prompt: its last token predicts the response's first, in each row.
    assert shared_tokens(data, [0, 2]) == 4
    assert shared_tokens(data, [2]) == 0  # one row shares with nobody
    assert shared_tokens(replace(data, starts=np.array([0, 4, 5])), [0, 1, 2]) == 0


def test_what_is_not_packed() -> None:
    def packs(model: nn.Module, data: Encoded = DATA, task: CausalLM = TASK) -> bool:
        return task.packed_loss(model, data) is not None

    assert packs(decoder("llama"))
    assert not packs(decoder("llama", "sdpa"))
    assert not packs(decoder("llama"), task=replace(TASK, device="meta"))
    assert not packs(tiny("gpt2"))
    short = decoder("mistral")
    short.config.sliding_window = 13  # a row of 14 tokens would see too much
    assert not packs(short)
    short.config.sliding_window = 14
    assert packs(short)
    growing = decoder("llama")
    growing.model.rotary_emb.rope_type = "dynamic"
    assert not packs(growing)
    again = decoder("llama")
    again.activation_checkpointing_enable({"use_reentrant": False})
    assert not packs(again)
