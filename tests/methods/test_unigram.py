"""The unigram control on models whose predictions are known."""

from __future__ import annotations

from dataclasses import replace
from math import exp, log

import numpy as np
import pytest
import torch
from one_client import adapted, one_client
from torch.nn import functional as F

from fedp2eft.errors import UserError
from fedp2eft.methods import METHODS, check_task
from fedp2eft.methods.unigram import added, offset, token_counts, unigram
from fedp2eft.settings.experiment import ModelSettings, Settings
from fedp2eft.tasks.causal_lm import CausalLM
from fedp2eft.tasks.encoded import Encoded

PROMPT = [1, 2]


def rows(*responses: list[int]) -> Encoded:
    tokens = [[*PROMPT, *response] for response in responses]
    return Encoded.from_rows(tokens, [0] * len(tokens), starts=[len(PROMPT)] * len(tokens))


def client(kind: str = "llama", **changes):
    facts = {"task": CausalLM(0, 16), "train": rows([5, 5, 6], [5]), "test": rows([5, 6], [7])}
    return one_client(bt=adapted(kind), **facts | changes)


@pytest.fixture
def even():
    """A client whose base finds all tokens equally likely."""
    made = client()
    with torch.no_grad():
        made.bt.model.get_output_embeddings().weight.zero_()
    return made


def test_counts_are_of_responses_alone_and_add_up(even) -> None:
    model = even.bt.model
    counts, expected = token_counts(even.task, model, even.train)
    vocabulary = model.config.vocab_size
    assert counts.nonzero().flatten().tolist() == [5, 6]
    assert counts[5:7].tolist() == [3, 1]
    assert expected.tolist() == pytest.approx([4 / vocabulary] * vocabulary)


def test_exact_numbers_of_an_even_base(even) -> None:
    size = even.bt.model.config.vocab_size
    each = 4 / size + 0.5
    shift = {5: log(3.5 / each), 6: log(1.5 / each), 7: log(0.5 / each)}
    total = log(exp(shift[5]) + exp(shift[6]) + (size - 2) * exp(shift[7]))
    want = sum(total - shift[token] for token in (5, 6, 7)) / 3
    outcome = unigram(even, 0)
    assert outcome.weights is None
    assert (outcome.scores.examples, outcome.scores.tokens) == (2, 3)
    assert outcome.scores.loss == pytest.approx(want, abs=1e-5)
    assert METHODS["base"].fit(even, 0).scores.loss == pytest.approx(log(size), abs=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_any_base_is_corrected_by_what_it_expects(kind) -> None:
    made = client(kind)
    model = made.bt.model
    with made.bt.off(), torch.no_grad():
        logits = {
            row: model(input_ids=torch.tensor([[*PROMPT, *row]])).logits[0, 1:-1].double()
            for row in ((5, 5, 6), (5,), (5, 6), (7,))
        }
    n = torch.zeros(model.config.vocab_size, dtype=torch.float64)
    n[5], n[6] = 3, 1
    m = sum(logits[row].softmax(dim=1).sum(dim=0) for row in ((5, 5, 6), (5,)))
    shift = torch.log((n + 0.5) / (m + 0.5))
    want = [
        F.cross_entropy(logits[row] + shift, torch.tensor(row), reduction="sum").item()
        for row in ((5, 6), (7,))
    ]
    found = unigram(made, 0).scores
    assert found.loss == pytest.approx(sum(want) / 3, rel=1e-5)
    before = METHODS["base"].fit(made, 0).scores.loss
    assert found.loss != pytest.approx(before, abs=1e-3)
    assert METHODS["base"].fit(made, 0).scores.loss == before  # the offset is gone


def test_texts_are_written_with_the_offset(even) -> None:
    """Of an even base the most frequent token is the answer."""
    written = []

    def answer(model):
        prompt = torch.tensor([[1, 2, 3]])
        written.append(model.generate(input_ids=prompt, max_new_tokens=2, do_sample=False)[0, 3:])
        return {}

    unigram(replace(even, answer=answer), 0)
    assert written[0].tolist() == [5, 5]


def test_without_training_rows_it_is_the_base() -> None:
    made = client()
    bare = replace(made, train=made.train.select(np.arange(0)))
    assert unigram(bare, 0).scores == METHODS["base"].fit(made, 0).scores
    assert offset(torch.zeros(3), torch.zeros(3)).tolist() == [0, 0, 0]


def test_a_model_that_bounds_its_logits_is_refused(monkeypatch) -> None:
    model = client().bt.model
    monkeypatch.setattr(model.config, "final_logit_softcapping", 30.0, raising=False)
    with pytest.raises(UserError, match="needs logits as its head gives them"), added(model, None):
        pass


def test_a_classification_is_refused() -> None:
    with pytest.raises(UserError, match="Method unigram is for causal LMs"):
        unigram(one_client(), 0)
    with pytest.raises(UserError, match="Method unigram is for causal LMs"):
        check_task("unigram", Settings())
    causal = Settings(model=ModelSettings(task="causal_lm"))
    check_task("unigram", causal)
    assert causal.evaluation.methods == ["base", "unigram", "lora", "fedp2eft"]
