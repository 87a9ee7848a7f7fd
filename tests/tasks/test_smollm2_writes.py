"""The real SmolLM2 answers a few real prompts."""

from __future__ import annotations

from fedp2eft.data.registry import load_clients
from fedp2eft.models.fit import longest_input
from fedp2eft.models.loading import load_base, load_tokenizer
from fedp2eft.models.sources import ModelSource
from fedp2eft.settings.data import DataSettings
from fedp2eft.tasks.causal_lm import CausalLM
from fedp2eft.tasks.generation import check_room, generate
from fedp2eft.tasks.make import make_task
from fedp2eft.tasks.prompts import Prompts
from fedp2eft.tasks.text_scores import text_scores


def test_it_answers_its_prompts_and_ends_its_turn(smollm2: ModelSource) -> None:
    model, tokenizer = load_base(smollm2, "causal_lm", max_length=64), load_tokenizer(smollm2)
    federation = load_clients(
        DataSettings(
            dataset="libreoffice-help", languages=["en_US", "ja"], clients_per_language=1,
            max_train=1, max_test=1,
        )
    )  # fmt: skip
    clients = [client for client in federation.clients if client.pool == "unseen"]
    rows = [int(row) for client in clients for row in client.test]
    titles, answers = federation.rows(rows)["title"], federation.answers(rows, "causal_lm")
    titles, answers = [*titles, "What is 2 + 2?"], [*answers, "4"]
    task = make_task("causal_lm", tokenizer, 64, "cpu")
    assert isinstance(task, CausalLM)
    check_room(longest_input(model), 64, 16)
    questions = list(task.questions(Prompts(tokenizer), [titles], answers))
    texts = generate(model, tokenizer, questions, 16, 4)
    assert len(texts) == 3
    assert all(texts)
    assert "4" in texts[2]
    assert not any("<|im_end|>" in text or "assistant\n" in text for text in texts)
    alone = generate(model, tokenizer, questions[2:], 16, 1)
    assert alone == texts[2:]
    sums = text_scores(texts, answers)
    assert 0 < sums["chrf"] < 3
