"""Classification: tokens of one text or a pair, logits in row order, scores that are known."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from fedp2eft.errors import UserError
from fedp2eft.tasks.classification import Classification
from fedp2eft.tasks.encoded import Encoded
from tiny import LONGEST, TASK, tiny, tiny_rows

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c", "d"]


@pytest.fixture(scope="module")
def tokenizer():
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


class Known(nn.Module):
    """Logits that are a table's row for the first token."""

    def __init__(self, table: list[list[float]]) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.tensor(table))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[input_ids[:, 0]])


# ── tokens ──────────────────────────────────────────────────────────────────────────────────────


def test_one_text_is_encoded_without_padding(tokenizer) -> None:
    data = Classification(0, 16).encode(tokenizer, [["a b", "c"]], [1, 0])
    assert data.tokens.tolist() == [2, 4, 5, 3, 2, 6, 3]
    assert data.offsets.tolist() == [0, 4, 7]
    assert data.labels.tolist() == [1, 0]
    assert data.types.tolist() == [0] * 7


def test_three_texts_are_one_text(tokenizer) -> None:
    """A tokenizer's third place is another thing: what stands there would be lost."""
    task = Classification(0, 16)
    joined = task.encode(tokenizer, [["a"], ["b"], ["c"]], [0])
    assert joined.tokens.tolist() == task.encode(tokenizer, [["a\n\nb\n\nc"]], [0]).tokens.tolist()
    assert joined.tokens.tolist() == [2, 4, 5, 6, 3]


def test_two_texts_are_encoded_as_a_pair_with_their_types(tokenizer) -> None:
    data = Classification(0, 16).encode(tokenizer, [["a", "b b"], ["c d", "d"]], [1, 2])
    batch = Classification(0, 16).batch(data, [0, 1])
    assert batch["input_ids"].tolist() == [[2, 4, 3, 6, 7, 3], [2, 5, 5, 3, 7, 3]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 1]]


def test_a_tokenizer_without_types_gives_rows_without_types(tokenizer) -> None:
    def plain(*columns, **options):
        found = tokenizer(*columns, **options)
        del found["token_type_ids"]
        return found

    assert Classification(0, 16).encode(plain, [["a b"]], [0]).types is None


def test_long_texts_are_cut_and_keep_their_last_special_token(tokenizer) -> None:
    task = Classification(0, 6)
    data = task.encode(tokenizer, [["a " * 20, "b"], ["c " * 20, "d"]], np.array([0, 1]))
    assert data.lengths.tolist() == [6, 5]
    assert data.tokens[:6].tolist()[-1] == 3
    [batch] = task.padded_batches(data, 4)
    assert batch["input_ids"].shape == (2, 6)


def test_no_rows_are_encoded_as_no_rows(tokenizer) -> None:
    assert len(Classification(0, 16).encode(tokenizer, [[]], [])) == 0


# ── batches ─────────────────────────────────────────────────────────────────────────────────────


def test_padded_batches_keep_row_order_and_pad_to_the_longest_allowed() -> None:
    data = tiny_rows([5, 3, 7])
    batches = list(TASK.padded_batches(data, 2))
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(2, LONGEST), (1, LONGEST)]
    assert [batch["attention_mask"].sum(dim=1).tolist() for batch in batches] == [[5, 3], [7]]


def test_feature_batches_pad_to_their_own_longest_row() -> None:
    shapes = [tuple(b["input_ids"].shape) for b in TASK.feature_batches(tiny_rows([5, 3, 7]), 2)]
    assert shapes == [(2, 7), (1, 3)]


def test_the_padding_token_is_the_tasks() -> None:
    batch = Classification(pad_id=9, max_length=8).batch(tiny_rows([1, 2]), [0, 1])
    assert batch["input_ids"][0, 1] == 9


# ── loss, logits, scores ────────────────────────────────────────────────────────────────────────


def test_loss_is_the_mean_cross_entropy_in_float32() -> None:
    data = Encoded.from_rows([[0], [1]], [0, 1])
    model = Known([[2.0, 0.0], [1.0, -1.0]]).to(torch.bfloat16)
    loss = TASK.loss(model, TASK.batch(data, [0, 1]))
    want = (np.log(1 + np.exp(-2)) + np.log(1 + np.exp(2))) / 2
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_logits_come_in_row_order_whatever_the_batch_size(batch_size) -> None:
    model, data = tiny("bert").eval(), tiny_rows([5, 3, 9, 1, 16, 7, 2])
    with torch.no_grad():
        want = []
        for row in range(len(data)):
            batch = TASK.batch(data, [row])
            batch.pop("labels")
            want.append(model(**batch).logits[0])
    got = TASK.logits(model, data, batch_size)
    assert torch.allclose(got, torch.stack(want), atol=1e-6)
    assert (got[0] - got[1]).abs().max() > 1e-4
    assert got.dtype == torch.float32


@pytest.mark.parametrize("training", [True, False])
def test_logits_are_taken_without_dropout_and_the_mode_comes_back(training) -> None:
    model, data = tiny("bert").train(training), tiny_rows([4, 2])
    assert torch.equal(TASK.logits(model, data, 2), TASK.logits(model, data, 2))
    assert model.training is training


def test_the_mode_comes_back_after_a_failure() -> None:
    model = tiny("bert").train()
    with pytest.raises(IndexError):
        TASK.logits(model, Encoded.from_rows([[99]], [0]), 2)
    assert model.training


def test_score_on_known_logits() -> None:
    table = [[3.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 1.0]]
    data = Encoded.from_rows([[0, 5], [1], [2, 1, 1], [0]], [0, 1, 0, 2])
    scores = TASK.score(Known(table), data, 3)

    def nats(hit: float, largest: float) -> float:
        return np.log(np.exp(largest) + 2) - hit

    want = np.mean([nats(3, 3), nats(2, 2), nats(0, 1), nats(0, 3)])
    assert (scores.examples, scores.correct, scores.accuracy) == (4, 2, 0.5)
    assert scores.loss == pytest.approx(want, rel=1e-6)


def test_no_rows_to_score_is_an_error() -> None:
    with pytest.raises(UserError, match="no rows to score"):
        TASK.score(Known([[0.0]]), Encoded.from_rows([], []), 4)
