"""Greedy generation: the same text as one token at a time, whatever it is batched with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from fedp2eft.errors import UserError
from fedp2eft.models.fit import longest_input
from fedp2eft.tasks.causal_lm import CausalLM
from fedp2eft.tasks.generation import Question, check_room, generate
from fedp2eft.tasks.prompts import Prompts
from tiny_chat import LENGTH, chat_tokenizer, save_llama

NEW = 8
TEXTS = ["chat", "un chat noir dort ici", "sur le mur", "noir noir noir noir", "eine katze"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = save_llama(tmp_path_factory.mktemp("llama"))
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    tokenizer = chat_tokenizer()
    task = CausalLM(Prompts(tokenizer).pad, LENGTH)
    return list(task.questions(Prompts(tokenizer), [TEXTS], TEXTS))


def by_hand(model: Any, tokenizer: Any, question: Question, ends: set[int]) -> str:
    """The likeliest token again and again, no cache, no padding."""
    ids = list(question.tokens)
    for _ in range(NEW):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token in ends:
            break
        ids.append(token)
    said = tokenizer.decode(ids[len(question.tokens) :], skip_special_tokens=True)
    return str(said).strip()


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_batches_padded_on_the_left_say_what_every_row_says_alone(llama, questions, batch):
    tokenizer = chat_tokenizer()
    told: list[float] = []
    texts = generate(llama, tokenizer, questions, NEW, batch, told.append)
    expected = [by_hand(llama, tokenizer, asked, {2, 7}) for asked in questions]
    assert texts == expected
    assert len(set(texts)) > 1
    assert told[-1] == 1.0
    assert len(told) == -(-len(questions) // batch)


@pytest.mark.parametrize("end", ["turn", "eos", "own"])
def test_a_row_ends_with_its_end_and_the_others_go_on(llama, questions, end, monkeypatch):
    """The template's end of turn, the tokenizer's end of text, the model's own further ends."""
    tokenizer, model = chat_tokenizer(), llama
    free = {q.prompt: by_hand(model, tokenizer, q, {2, 7}) for q in questions}
    longest = max(free.values(), key=lambda text: len(text.split()))
    stop = longest.split()[2]  # a word that is now declared to end a text
    stop_id = tokenizer.convert_tokens_to_ids(stop)
    if end == "turn":
        monkeypatch.setattr(Prompts, "_turn_end", lambda self: stop_id)
        ends = {2, stop_id}
    elif end == "eos":
        tokenizer.eos_token, ends = stop, {stop_id, 2, 7}
    else:
        monkeypatch.setattr(model.generation_config, "eos_token_id", [2, stop_id])
        ends = {2, 7, stop_id}
    texts = generate(model, tokenizer, questions, NEW, 8)
    assert texts == [by_hand(model, tokenizer, asked, ends) for asked in questions]
    assert texts != list(free.values())
    assert any(texts)


def test_greedy_whatever_the_model_asks_for(llama, questions):
    tokenizer = chat_tokenizer()
    plain = generate(llama, tokenizer, questions, NEW, 8)
    own = llama.generation_config
    wild = GenerationConfig(
        do_sample=True, temperature=5.0, repetition_penalty=3.0, no_repeat_ngram_size=1,
        suppress_tokens=[9, 10], min_new_tokens=4, eos_token_id=2,
    )  # fmt: skip
    llama.generation_config = wild
    llama.train()
    try:
        assert generate(llama, tokenizer, questions, NEW, 8) == plain
        assert llama.generation_config is wild
        assert llama.training
    finally:
        llama.generation_config = own
        llama.eval()


def test_questions_are_the_rows_that_encode_keeps():
    tokenizer = chat_tokenizer()
    prompts, task = Prompts(tokenizer), CausalLM(3, 8)
    texts = ["chat", "un chat noir dort ici sur le mur", "le mur"]
    answers = ["noir", "ici", "un chat noir dort ici"]
    kept = list(task.questions(prompts, [texts], answers))
    assert [asked.reference for asked in kept] == ["noir", "un chat noir dort ici"]
    data = task.encode(tokenizer, [texts], answers)
    assert (len(data), data.dropped, data.cut) == (2, 1, 1)
    assert [len(asked.tokens) for asked in kept] == data.starts.tolist()


def test_of_a_conversation_the_turns_are_shown():
    tokenizer = chat_tokenizer()
    turns = [("user", "chat"), ("assistant", "noir"), ("user", "le mur"), ("assistant", "ici")]
    chat = [{"role": role, "content": content} for role, content in turns]
    [asked] = CausalLM(3, 64).questions(Prompts(tokenizer), [[chat]], [chat])
    assert (asked.prompt, asked.reference) == ("chat\n\nnoir\n\nle mur", "ici")


def test_no_questions_no_texts(llama):
    assert generate(llama, chat_tokenizer(), [], NEW, 4) == []


def test_a_response_that_the_model_cannot_read_is_one_line(llama):
    check_room(longest_input(llama), LENGTH, 3 * LENGTH)
    with pytest.raises(UserError, match=r"reads 96 tokens.* lower evaluation\.max_new_tokens"):
        check_room(longest_input(llama), LENGTH, 3 * LENGTH + 1)
