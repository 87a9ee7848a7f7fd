"""Batches, loss and scores of a causal LM, against the numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fedp2eft.errors import UserError
from fedp2eft.tasks.causal_lm import IGNORED, CausalLM
from fedp2eft.tasks.encoded import Encoded
from fedp2eft.tasks.make import make_task
from fedp2eft.tasks.prompts import Prompts
from tiny import VOCABULARY, tiny
from tiny_chat import chat_tokenizer

TASK = CausalLM(pad_id=3, max_length=16)
ROWS = ([5, 6, 7, 8, 9], [5, 6, 2], [4, 4, 4, 4, 1, 2, 2])
STARTS = (2, 2, 6)


def rows() -> Encoded:
    return Encoded.from_rows(ROWS, [0] * 3, starts=STARTS)


def by_hand(model, row: list[int], start: int) -> list[float]:
    """−log p of every response token of one row alone."""
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor([row])).logits[0].float()
    log_p = logits.log_softmax(dim=-1)
    return [-float(log_p[at - 1, row[at]]) for at in range(start, len(row))]


def test_labels_are_the_response_and_its_end_and_nothing_else():
    batch = TASK.batch(rows(), [0, 1, 2])
    assert batch["input_ids"].tolist() == [
        [5, 6, 7, 8, 9, 3, 3],
        [5, 6, 2, 3, 3, 3, 3],
        [4, 4, 4, 4, 1, 2, 2],
    ]
    assert batch["attention_mask"].tolist() == [[1] * 5 + [0] * 2, [1] * 3 + [0] * 4, [1] * 7]
    i = IGNORED
    assert batch["labels"].tolist() == [
        [i, i, 7, 8, 9, i, i],
        [i, i, 2, i, i, i, i],
        [i, i, i, i, i, i, 2],
    ]


def test_padding_is_no_target_even_where_it_is_the_end_token():
    labels = replace(TASK, pad_id=2).batch(rows(), [0, 1])["labels"]
    assert labels.tolist() == [[IGNORED, IGNORED, 7, 8, 9], [IGNORED, IGNORED, 2, *[IGNORED] * 2]]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_loss_is_the_mean_over_the_response_tokens_of_the_batch(kind):
    model = tiny(kind, dropout=0.0).eval()
    nats = [by_hand(model, row, start) for row, start in zip(ROWS, STARTS, strict=True)]
    for chosen in ([0, 1, 2], [1], [0, 2]):
        told = [value for i in chosen for value in nats[i]]
        loss = TASK.loss(model, TASK.batch(rows(), chosen))
        assert float(loss) == pytest.approx(sum(told) / len(told), rel=1e-5)


def test_loss_agrees_with_transformers_own():
    model = tiny("llama").eval()
    batch = TASK.batch(rows(), [0, 1, 2])
    assert float(TASK.loss(model, batch)) == pytest.approx(float(model(**batch).loss), rel=1e-5)


def test_gradients_reach_nothing_through_prompts_or_padding():
    model = tiny("llama").eval()
    before = TASK.loss(model, TASK.batch(rows(), [1]))
    longer = TASK.loss(model, {k: F.pad(v, (0, 4), value=0 if k != "labels" else IGNORED)
                               for k, v in TASK.batch(rows(), [1]).items()})  # fmt: skip
    assert float(before) == pytest.approx(float(longer), rel=1e-6)


class CountingLogits(torch.nn.Module):
    """Says how many positions it was asked for."""

    def __init__(self, model):
        super().__init__()
        self.model, self.asked = model, []

    def forward(self, **inputs):
        self.asked.append(inputs["logits_to_keep"])
        return self.model(**inputs)


def test_logits_of_the_common_prompt_are_not_computed():
    model = CountingLogits(tiny("llama").eval())
    TASK.loss(model, TASK.batch(rows(), [2]))
    TASK.loss(model, TASK.batch(rows(), [0, 2]))
    assert model.asked == [2, 6]  # one position ahead of the first response token


def test_a_response_that_starts_a_row_has_no_token_to_be_told_from():
    data = Encoded.from_rows([[5, 6, 7]], [0], starts=[0])
    loss = TASK.loss(tiny("llama").eval(), TASK.batch(data, [0]))
    assert float(loss) == pytest.approx(np.mean(by_hand(tiny("llama"), [5, 6, 7], 1)), rel=1e-5)


def test_scores_weigh_every_response_token_alike():
    model = tiny("llama")
    model.train()
    nats = [by_hand(tiny("llama"), row, s) for row, s in zip(ROWS, STARTS, strict=True)]
    total = [value for each in nats for value in each]
    for batch_size in (1, 2, 3):
        scores = TASK.score(model, rows(), batch_size)
        assert (scores.examples, scores.tokens, scores.correct) == (3, 5, None)
        assert scores.loss == pytest.approx(np.mean(total), rel=1e-5)
        assert scores.perplexity == pytest.approx(np.exp(np.mean(total)), rel=1e-5)
    sums, tokens = TASK.losses(model, rows(), 2)
    assert tokens.tolist() == [3, 1, 1]
    assert sums.tolist() == pytest.approx([sum(each) for each in nats], rel=1e-5)
    assert model.training


def test_no_rows_have_no_scores():
    none = Encoded.from_rows([], [], starts=[])
    with pytest.raises(UserError, match="no rows to score"):
        TASK.score(tiny("llama"), none, 2)
    scores = TASK.unscored()
    assert scores.metrics() == {"examples": 0, "loss": 0.0, "tokens": 0}
    assert np.isnan(scores.perplexity)
    assert scores.facts() == {"response_loss": None}


def encode(texts, answers, **options):
    tokenizer = chat_tokenizer()
    task = make_task("causal_lm", tokenizer, options.get("max_length", 16), "cpu")
    assert isinstance(task, CausalLM)
    return tokenizer, task.encode(tokenizer, texts, answers)


def words(tokenizer, data: Encoded, row: int) -> list[str]:
    ids = data.tokens[data.offsets[row] : data.offsets[row + 1]]
    return tokenizer.convert_ids_to_tokens(ids.tolist())


def test_rows_are_prompt_response_and_end():
    tokenizer, data = encode([["chat", "un"]], ["noir", "mur ici"])
    assert words(tokenizer, data, 1) == (
        ["<|user|>", "un", "<|end|>", "<|assistant|>", "mur", "ici", "<|end|>"]
    )
    assert data.starts.tolist() == [4, 4]
    assert data.labels.tolist() == [0, 0]
    assert (data.dropped, data.cut) == (0, 0)


def test_several_columns_make_one_prompt_and_a_conversation_ends_with_the_response():
    tokenizer, data = encode([["chat"], ["noir"]], ["mur"])
    assert words(tokenizer, data, 0)[:3] == ["<|user|>", "chat", "noir"]
    talk = [
        {"role": "user", "content": "chat"},
        {"role": "assistant", "content": "noir"},
        {"role": "user", "content": "un"},
        {"role": "assistant", "content": "mur"},
    ]
    tokenizer, data = encode([[talk]], [talk])
    said = words(tokenizer, data, 0)
    assert said[data.starts[0] :] == ["mur", "<|end|>"]
    assert said.count("<|assistant|>") == 2


def test_long_prompts_are_dropped_and_long_responses_cut_and_both_counted():
    prompts = ["chat " * n for n in (1, 7, 8, 3)]
    tokenizer, data = encode([prompts], ["mur mur mur", "ici", "ici", "noir " * 9], max_length=11)
    # a prompt of 8 words is 11 tokens: no room for a response
    assert (len(data), data.dropped, data.cut) == (3, 1, 2)
    assert words(tokenizer, data, 1)[-2:] == ["<|assistant|>", "ici"]  # its end was cut off
    assert data.lengths.tolist() == [8, 11, 11]
    assert words(tokenizer, data, 0)[-1] == "<|end|>"
    assert words(tokenizer, data, 2)[-1] == "noir"


def test_rows_chosen_keep_their_starts():
    data = rows().select([2, 0])
    assert data.starts.tolist() == [6, 2]
    assert TASK.batch(data, [0])["labels"].tolist() == TASK.batch(rows(), [2])["labels"].tolist()


def test_batches_for_features_hold_every_row_once():
    seen = [batch["input_ids"].shape for batch in TASK.feature_batches(rows(), 2)]
    assert seen == [(2, 7), (1, 3)]
    padded = list(TASK.padded_batches(rows(), 2))
    assert [batch["input_ids"].shape for batch in padded] == [(2, 16), (1, 16)]
    assert int(padded[0]["attention_mask"].sum()) == 8


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(0, 8)), min_size=1, max_size=6),
    st.integers(8, 20),
)
def test_every_target_is_a_response_token_or_its_end(sizes, longest):
    tokenizer = chat_tokenizer()
    task = CausalLM(Prompts(tokenizer).pad, longest)
    texts = [["chat " * prompt for prompt, _ in sizes]]
    data = task.encode(tokenizer, texts, ["mur " * response for _, response in sizes])
    fits = [(p, r) for p, r in sizes if p + 3 < longest]
    assert data.dropped == len(sizes) - len(fits)
    assert data.cut == sum(p + 3 + r + 1 > longest for p, r in fits)
    if not fits:
        return
    batch = task.batch(data, range(len(fits)))
    end, wall = tokenizer.convert_tokens_to_ids(["<|end|>", "mur"])
    for labels, (p, r) in zip(batch["labels"].tolist(), fits, strict=True):
        kept = [label for label in labels if label != IGNORED]
        assert kept == ([wall] * r + [end])[: longest - p - 3]
    assert int(batch["input_ids"].max()) < max(VOCABULARY, len(tokenizer))
