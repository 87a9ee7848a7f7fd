"""Prompts by the chat template or Alpaca's, the token that ends a response, and padding."""

import logging

import pytest
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

from fedp2eft.errors import UserError
from fedp2eft.tasks.prompts import ALPACA, Prompts
from tiny_chat import chat_tokenizer


def words(prompts: Prompts, ids: list[int]) -> list[str]:
    return prompts.tokenizer.convert_ids_to_tokens(ids)


def test_the_chat_template_makes_the_prompt_and_ends_the_response():
    prompts = Prompts(chat_tokenizer())
    said = words(prompts, prompts.prompt("chat noir"))
    assert said == ["<|user|>", "chat", "noir", "<|end|>", "<|assistant|>"]
    assert words(prompts, prompts.response("noir chat")) == ["noir", "chat", "<|end|>"]


def test_prompt_and_response_are_the_tokens_of_the_whole_conversation():
    prompts = Prompts(chat_tokenizer())
    turns = [
        {"role": "system", "content": "ici"},
        {"role": "user", "content": "un chat"},
        {"role": "assistant", "content": "dort"},
        {"role": "user", "content": "noir"},
    ]
    answer = {"role": "assistant", "content": "sur le mur"}
    whole = prompts.tokenizer.apply_chat_template([*turns, answer], return_dict=False)
    assert prompts.prompt(turns) + prompts.response(answer["content"]) == whole


def test_without_a_chat_template_it_is_alpacas():
    prompts = Prompts(chat_tokenizer(chat=False))
    assert not prompts.chat
    ids = prompts.prompt("chat")
    assert ids == prompts.tokenizer(ALPACA.format(prompt="chat"))["input_ids"]
    assert ids == prompts.prompt([{"role": "user", "content": "chat"}])
    assert ALPACA.format(prompt="Say hello.").endswith(
        "### Instruction:\nSay hello.\n\n### Response:\n"
    )
    assert words(prompts, prompts.response("noir"))[-1] == "</s>"


def test_an_end_that_a_tokenizer_puts_behind_every_text_is_not_part_of_a_prompt():
    tokenizer = chat_tokenizer(chat=False)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    ids = Prompts(tokenizer).prompt("chat")
    assert ids[0] == 1
    assert 2 not in ids


def test_several_turns_need_a_chat_template():
    turns = [{"role": "user", "content": "chat"}, {"role": "assistant", "content": "noir"}]
    with pytest.raises(UserError, match="no chat template"):
        Prompts(chat_tokenizer(chat=False)).prompt(turns)


def test_a_conversation_that_the_template_refuses_is_one_line():
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}x"
    )
    with pytest.raises(UserError, match=r"^The chat template refuses a conversation: no system\.$"):
        Prompts(tokenizer).prompt([{"role": "system", "content": "a"}])


def test_a_template_that_ends_no_turn_leaves_the_end_to_eos():
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = "{% for turn in messages %}{{ turn['content'] }}\n{% endfor %}"
    assert Prompts(tokenizer).end == tokenizer.eos_token_id


def test_nothing_from_outside_gets_into_a_prompt():
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%s') %}{% endif %}"
        "{{ date_string }}"
        "{% if enable_thinking is not defined or enable_thinking %} chat{% endif %}"
    )
    said = words(prompts := Prompts(tokenizer), prompts.prompt("noir"))
    assert said == ["<unk>"] * 3  # 26 Jul 2024


@pytest.mark.parametrize(
    ("roles", "leave_out", "expected"),
    [
        ({}, (), "<pad>"),
        ({"pad_token": None}, (), "<pad>"),  # named after padding
        ({"pad_token": "</s>"}, (), "<pad>"),
        ({"pad_token": "</s>"}, ("<pad>",), "<unk>"),
        ({"pad_token": "<|end|>"}, ("<pad>",), "<unk>"),  # ends a response
        ({"pad_token": None, "unk_token": None}, ("<pad>",), "<unk>"),  # any special one
    ],
)
def test_padding_is_never_the_end_of_a_text(roles, leave_out, expected):
    prompts = Prompts(chat_tokenizer(leave_out=leave_out, **roles))
    assert words(prompts, [prompts.pad]) == [expected]
    assert prompts.pad not in (prompts.end, prompts.tokenizer.eos_token_id)


def test_a_vocabulary_without_anything_else_says_that_it_pads_with_its_end(caplog):
    inner = Tokenizer(models.WordLevel({"a": 0, "<|endoftext|>": 1}, unk_token="<|endoftext|>"))
    one = dict.fromkeys(["unk_token", "bos_token", "eos_token"], "<|endoftext|>")  # as GPT-2 has it
    with caplog.at_level(logging.WARNING):
        assert Prompts(PreTrainedTokenizerFast(tokenizer_object=inner, **one)).pad == 1
    assert "no padding token except" in caplog.text


def test_a_tokenizer_without_an_end_of_text_is_refused():
    with pytest.raises(UserError, match="no end-of-text token"):
        Prompts(chat_tokenizer(eos_token=None))
