"""Greedy generation: the response that a causal LM gives to each prompt.

With transformers' own `generate`: batches of similar length, padded on the left, with a KV cache,
until every row has ended or has `max_new_tokens`. A row ends with the token that ended the
responses in training (the chat template's end of turn), the tokenizer's end of text, or what the
model's own generation config ends with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import nn

from fedp2eft.errors import UserError
from fedp2eft.modes import in_mode, with_values
from fedp2eft.tasks.prompts import Prompts


@dataclass(frozen=True)
class Question:
    """A prompt to answer.

    Args:
        prompt: As a person reads it; of a conversation its turns, one a paragraph.
        tokens: As the model reads it.
        reference: The response of the data.
    """

    prompt: str
    tokens: Sequence[int]
    reference: str


def check_room(longest: int | None, max_length: int, max_new_tokens: int) -> None:
    """Raise `UserError` if prompt and response may be longer than the model reads.

    Args:
        longest: Most tokens that the model reads (`models.fit.longest_input`).
        max_length: Longest prompt.
        max_new_tokens: Most tokens of a response.
    """
    if longest and max_length + max_new_tokens > longest:
        raise UserError(
            f"The model reads {longest} tokens, fewer than a prompt of local.max_length = "
            f"{max_length} with {max_new_tokens} new ones: lower evaluation.max_new_tokens or "
            "local.max_length."
        )


@torch.inference_mode()
def generate(
    model: nn.Module,
    tokenizer: Any,
    questions: Sequence[Question],
    max_new_tokens: int,
    batch_size: int,
    progress: Callable[[float], None] | None = None,
) -> list[str]:
    """Return responses in the order of the questions, without special tokens and outer blanks.

    Args:
        model: A causal LM of transformers, or one that PEFT has adapted; left in the mode it is in.
        tokenizer: Its tokenizer.
        questions: The prompts.
        max_new_tokens: Most tokens of a response.
        batch_size: Prompts that are answered at once.
        progress: Called with the share of the prompts that have been answered.
    """
    from transformers import GenerationConfig

    prompts = Prompts(tokenizer)
    base: Any = getattr(model, "get_base_model", lambda: model)()
    own = base.generation_config
    ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    wanted = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        pad_token_id=prompts.pad,
        eos_token_id=sorted({prompts.end, tokenizer.eos_token_id, *ends} - {None}),
    )
    device = next(model.parameters()).device
    order = sorted(range(len(questions)), key=lambda i: -len(questions[i].tokens))
    answers = [""] * len(questions)
    # What a call leaves open comes from the config: many models ask for sampling and penalties.
    defaults = GenerationConfig()
    with in_mode(model, training=False), with_values(base, generation_config=defaults):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            width = len(questions[chosen[0]].tokens)
            ids = torch.full((len(chosen), width), prompts.pad)
            mask = torch.zeros_like(ids)
            for row, number in enumerate(chosen):
                tokens = torch.tensor(questions[number].tokens)
                ids[row, width - len(tokens) :], mask[row, width - len(tokens) :] = tokens, 1
            made = base.generate(
                input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=wanted
            )
            for number, tokens in zip(chosen, made[:, width:].tolist(), strict=True):
                # What follows on the first token that ends a response is padding.
                said = list(takewhile(lambda token: token not in wanted.eos_token_id, tokens))
                answers[number] = tokenizer.decode(said, skip_special_tokens=True).strip()
            if progress:
                progress((start + len(chosen)) / len(order))
    return answers
