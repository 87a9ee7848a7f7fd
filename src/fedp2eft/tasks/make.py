"""The task of a model: classification or causal language modelling."""

from __future__ import annotations

from typing import Any, Literal

import torch

from fedp2eft.tasks.causal_lm import CausalLM
from fedp2eft.tasks.classification import Classification
from fedp2eft.tasks.prompts import Prompts
from fedp2eft.tasks.task import Task


def make_task(
    kind: Literal["classification", "causal_lm"],
    tokenizer: Any,
    max_length: int,
    device: torch.device | str,
    config: Any = None,
) -> Task:
    """Return the task of that kind for a model's tokenizer.

    Args:
        kind: `model.task` of the settings.
        tokenizer: A Hugging Face tokenizer.
        max_length: Longest input in tokens.
        device: Where batches go.
        config: The model's: how many tokens it has embeddings for, and whether its results
            depend on a row's padding.
    """
    text = config.get_text_config() if config else None
    size = getattr(text, "vocab_size", None)
    if kind == "causal_lm":
        return CausalLM(Prompts(tokenizer, size).pad, max_length, device, size)
    # CANINE's convolutions read across the end of a row: every row is padded alike.
    whole = hasattr(text, "downsampling_rate")
    return Classification(int(tokenizer.pad_token_id), max_length, device, size, whole=whole)
