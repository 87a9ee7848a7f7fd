"""Prompts and responses as tokens: by the tokenizer's own chat template, else by Alpaca's.

Prompt and response are tokenized apart and joined, so that training sees the very tokens that
generation starts from.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fedp2eft.errors import UserError, first_line

logger = logging.getLogger(__name__)

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{prompt}\n\n### Response:\n"
)
FIXED = {"date_string": "26 Jul 2024", "enable_thinking": False}
"""What some templates take from outside: Llama 3.2's would put today's date into every prompt."""

Turn = Mapping[str, str]
Prompt = str | Sequence[Turn]
"""A text, or the turns of a conversation ("role" and "content") before the response."""


class Prompts:
    """Prompts and responses as one tokenizer's tokens.

    Args:
        tokenizer: A Hugging Face tokenizer.
        vocabulary: Token ids that the model has embeddings for; None if that is not known.

    Attributes:
        end: Token that ends a response: the one that the chat template ends a turn with, else eos.
        pad: Token at padding positions.

    Raises:
        UserError: The tokenizer has no end-of-text token.
    """

    def __init__(self, tokenizer: Any, vocabulary: int | None = None) -> None:
        self.tokenizer = tokenizer
        self.chat = bool(tokenizer.chat_template)
        if tokenizer.eos_token_id is None:
            raise UserError(
                "The tokenizer has no end-of-text token, which a response must end with: set "
                "eos_token in its tokenizer_config.json."
            )
        self._special = {
            int(id_): str(token)
            for id_, token in sorted(tokenizer.added_tokens_decoder.items())
            if token.special and (vocabulary is None or id_ < vocabulary)
        }
        self.end = self._turn_end() if self.chat else int(tokenizer.eos_token_id)
        self.pad = self._padding()

    def prompt(self, prompt: Prompt) -> list[int]:
        """Return the tokens that a response follows."""
        if self.chat:
            turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            return self._tokens(self._rendered(turns, add_generation_prompt=True))
        if not isinstance(prompt, str):
            if len(prompt) != 1:
                raise UserError(
                    "A conversation has several turns, and the model's tokenizer has no chat "
                    "template: choose an instruct model, or data of one prompt and one response."
                )
            prompt = prompt[0]["content"]
        ids = list(self.tokenizer(ALPACA.format(prompt=prompt))["input_ids"])
        # Some tokenizers end every text; here the response follows.
        return ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids

    def response(self, text: str) -> list[int]:
        """Return the tokens of a response and its end."""
        return [*self._tokens(text), self.end]

    def _tokens(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _rendered(self, turns: Sequence[Turn], *, add_generation_prompt: bool) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                [dict(turn) for turn in turns],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **FIXED,
            )
        except Exception as error:  # templates raise what they like, of jinja's own kinds
            raise UserError(
                f"The chat template refuses a conversation: {first_line(error)}."
            ) from error
        return str(text)

    def _turn_end(self) -> int:
        """Return the special token after a response in the chat template; eos if there is none.

        Gemma's turns end with <end_of_turn>, which is not its tokenizer's eos.
        """
        turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "R"}]
        tail = self._rendered(turns, add_generation_prompt=False).rpartition("R")[2]
        ids = self._tokens(tail.strip())
        return ids[0] if ids and ids[0] in self._special else int(self.tokenizer.eos_token_id)

    def _padding(self) -> int:
        """Return a token for padding positions that ends no text, if the vocabulary has one.

        In order: the tokenizer's own, a special one that is named after padding, the unknown token,
        any special one that neither starts nor ends anything. A vocabulary without any of them
        (GPT-2's) pads with its end of text, and the log says so. Even that is safe: loss, attention
        and ξ know padding by its position alone. So no embedding is ever added for it.
        """
        t = self.tokenizer
        taken = {t.eos_token_id, t.bos_token_id, self.end}
        named = [id_ for id_, token in self._special.items() if "pad" in token.lower()]
        for id_ in (t.pad_token_id, *named, t.unk_token_id, *self._special):
            if id_ is not None and id_ not in taken:
                return int(id_)
        logger.warning(
            "The vocabulary has no padding token except its end-of-text token; padding is "
            "recognized by its position."
        )
        return int(t.eos_token_id)
