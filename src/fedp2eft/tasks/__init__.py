"""Rows as batches, losses and scores."""

from __future__ import annotations

from typing import Any, Literal

import torch

from fedp2eft.tasks.causal_lm import CausalLM
from fedp2eft.tasks.classification import Classification
from fedp2eft.tasks.prompts import Prompts
from fedp2eft.tasks.task import Scores, Task

__all__ = ["Scores", "Task", "make_task"]


def make_task(
    kind: Literal["classification", "causal_lm"],
    tokenizer: Any,
    max_length: int,
    device: torch.device | str,
) -> Task:
    """The task of that kind for a model's tokenizer.

    Args:
        kind: `model.task` of the settings.
        tokenizer: A Hugging Face tokenizer.
        max_length: Longest input in tokens.
        device: Where batches go.
    """
    if kind == "causal_lm":
        return CausalLM(Prompts(tokenizer).pad, max_length, device)
    pad = tokenizer.pad_token_id
    return Classification(0 if pad is None else int(pad), max_length, device)
