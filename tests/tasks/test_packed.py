"""Rows end to end without padding: loss and gradients are those of padded rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, DistilBertConfig

from fedp2eft.adapters.btlora import BTLora
from fedp2eft.settings.experiment import AdapterSettings
from fedp2eft.tasks import packed
from fedp2eft.tasks.causal_lm import CausalLM
from fedp2eft.tasks.encoded import Encoded
from fedp2eft.tasks.packed import pack
from fedp2eft.tasks.packed_attention import Block, _Attention
from tiny import (
    CLASSES,
    ENCODERS,
    LONGEST,
    TASK,
    VOCABULARY,
    classifier,
    disturb,
    tiny,
    tiny_rows,
)  # fmt: skip

DATA = tiny_rows([5, 14, 3, 5, 14, 6, 13, 1])
ROWS = np.array([6, 1, 0, 2, 3, 7, 5])


def adapted(kind: str) -> BTLora:
    bt = BTLora(classifier(kind), AdapterSettings(r_max=4))
    bt.lam.data = bt.lam.data.double()
    bt.reset(0.5)
    disturb(bt)
    return bt


def packed_loss(model: nn.Module, data: Encoded, rows: np.ndarray) -> Tensor:
    loss_of = TASK.packed_loss(model, data)
    assert loss_of is not None
    return loss_of(rows)


@pytest.mark.parametrize("block_tokens", [0, 4, 1000])  # rows of one length, of some, all rows
@pytest.mark.parametrize("kind", ENCODERS)
def test_loss_and_every_gradient_are_those_of_padded_rows(
    kind: str, block_tokens: int, monkeypatch
) -> None:
    monkeypatch.setattr(packed, "BLOCK_TOKENS", block_tokens)
    bt = adapted(kind)
    leaves = [*bt.A, *bt.B, bt.lam]
    found = []
    for loss in (packed_loss(bt.model, DATA, ROWS), TASK.loss(bt.model, TASK.batch(DATA, ROWS))):
        found.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for mine, whole in zip(*found, strict=True):
        # The loss itself is float32, and scores are scaled on another side of their product.
        torch.testing.assert_close(mine, whole, rtol=1e-5, atol=1e-8)
    assert max(float(gradient.abs().max()) for gradient in found[0][1:]) > 1e-3


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, LONGEST), min_size=1, max_size=12),
    block_tokens=st.sampled_from([0, 8, 32]),
)
def test_any_rows_have_the_loss_of_padded_ones(lengths: list[int], block_tokens: int) -> None:
    model, data = classifier("bert"), tiny_rows(lengths)
    rows = np.arange(len(lengths))
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(packed, "BLOCK_TOKENS", block_tokens)
        mine = packed_loss(model, data, rows)
    whole = TASK.loss(model, TASK.batch(data, rows))
    torch.testing.assert_close(mine, whole.detach(), rtol=1e-6, atol=1e-6)


def test_token_types_go_with_their_tokens() -> None:
    types = [[0] * (n // 2) + [1] * (n - n // 2) for n in DATA.lengths]
    data = replace(DATA, types=np.concatenate(types).astype(np.int32))
    model = classifier("bert")
    mine = packed_loss(model, data, ROWS).detach()
    torch.testing.assert_close(mine, TASK.loss(model, TASK.batch(data, ROWS)).detach())
    assert float((mine - packed_loss(model, DATA, ROWS)).abs()) > 1e-6


def test_rows_stand_end_to_end_longest_first() -> None:
    inputs, packing, order = pack(DATA, ROWS)
    assert list(DATA.lengths[order]) == [14, 13, 6, 5, 5, 3, 1]
    tokens = [DATA.tokens[DATA.offsets[i] : DATA.offsets[i + 1]] for i in order]
    assert inputs["input_ids"].tolist() == [np.concatenate(tokens).tolist()]
    positions = [position for row in tokens for position in range(len(row))]
    assert inputs["position_ids"].tolist() == [positions]
    assert packing.starts.tolist() == [0, 14, 27, 33, 38, 43, 46]
    assert [position for block in packing.blocks for position in firsts(block)] == [
        0, 14, 27, 33, 38, 43, 46,
    ]  # fmt: skip


def firsts(block: Block) -> list[int]:
    return torch.arange(block.stop)[block.firsts].tolist()


# ── attention ───────────────────────────────────────────────────────────────────────────────────


def states(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(12, 2, 3, generator=generator, dtype=torch.float64, requires_grad=True)


BLOCKS = [Block.of(np.array([4, 3]), 0), Block.of(np.array([2, 2]), 7), Block.of(np.array([1]), 11)]


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize(("first_only", "causal"), [(False, False), (True, False), (False, True)])
def test_the_gradient_of_attention(first_only: bool, causal: bool, dropout: float) -> None:
    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        torch.manual_seed(1)  # the same places are dropped at every call
        if causal:  # both heads of queries share one of keys and values
            key, value = key[:, :1], value[:, :1]
        return _Attention.apply(query, key, value, BLOCKS, 0.7, dropout, first_only, causal)

    assert torch.autograd.gradcheck(attention, (states(0), states(1), states(2)))


def test_dropout_drops_that_share_and_keeps_the_mean() -> None:
    """Every value is 1, so that a position's output is the sum of its attention that is left."""
    torch.manual_seed(0)
    block = Block.of(np.full(40, 50), 0)
    q = torch.zeros(2000, 2, 3)
    out = _Attention.apply(q, q, torch.ones_like(q), [block], 1.0, 0.25, False, False)
    assert float(out.mean()) == pytest.approx(1, abs=0.01)
    assert float(out[:, :, 0].std()) == pytest.approx((0.25 / 0.75 / 50) ** 0.5, rel=0.1)


def test_the_models_own_dropout_is_drawn_from_the_seed() -> None:
    model = tiny("bert", dropout=0.3)
    model.set_attn_implementation("eager")
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(float(packed_loss(model.train(), DATA, ROWS)))
    assert losses[0] == losses[1] != losses[2]


def test_under_autocast_packed_rows_have_the_loss_of_padded_ones() -> None:
    """As the base itself is trained in bf16."""
    model = classifier("bert").float().requires_grad_(True)
    found = []
    for loss_of in (
        lambda: packed_loss(model, DATA, ROWS),
        lambda: TASK.loss(model, TASK.batch(DATA, ROWS)),
    ):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of()
        found.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
    for mine, whole in zip(*found, strict=True):
        torch.testing.assert_close(mine, whole, rtol=0.05, atol=0.01)


# ── where it applies ────────────────────────────────────────────────────────────────────────────


def test_what_is_packed_and_what_is_not() -> None:
    eager = classifier("bert")
    assert TASK.packed_loss(eager, DATA) is not None
    assert replace(TASK, device="cuda").packed_loss(eager, DATA) is None
    assert TASK.packed_loss(classifier("bert", attention="sdpa"), DATA) is None
    saving = classifier("bert")
    saving.gradient_checkpointing_enable({"use_reentrant": False})
    assert TASK.packed_loss(saving, DATA) is None
    other = DistilBertConfig(
        vocab_size=VOCABULARY, dim=16, n_layers=1, n_heads=2, hidden_dim=24, num_labels=CLASSES
    )
    distil = AutoModelForSequenceClassification.from_config(other)
    distil.set_attn_implementation("eager")
    assert TASK.packed_loss(distil, DATA) is None
    assert CausalLM(0, LONGEST).packed_loss(tiny("llama"), DATA) is None


def test_the_model_is_left_as_it_was_even_after_an_error(monkeypatch) -> None:
    model = classifier("bert")
    whole = TASK.logits(model, DATA, 4)
    packed_loss(model, DATA, ROWS)
    monkeypatch.setattr(Block, "spread", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        packed_loss(model, DATA, ROWS)
    assert model.config._attn_implementation == "eager"
    assert torch.equal(TASK.logits(model, DATA, 4), whole)


# ── passes ──────────────────────────────────────────────────────────────────────────────────────


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=40), most=st.integers(1, 200))
def test_a_mini_batch_is_cut_into_passes_of_at_most_so_many_tokens(
    lengths: list[int], most: int
) -> None:
    data = tiny_rows(lengths)
    passes = data.passes(np.arange(len(lengths)), most)
    assert sorted(row for rows, _ in passes for row in rows) == list(range(len(lengths)))
    assert sum(share for _, share in passes) == pytest.approx(1)
    assert [share for _, share in passes] == [len(rows) / len(lengths) for rows, _ in passes]
    assert len(passes) <= -(-sum(lengths) // most)
    longest = [max(lengths[row] for row in rows) for rows, _ in passes]
    assert longest == sorted(longest, reverse=True)
    for rows, _ in passes:
        # A row is in the pass that its last token falls into.
        assert sum(lengths[row] for row in rows) < most + max(lengths[row] for row in rows)
