"""What every task gives to the rest: batches, a loss and scores."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedp2eft.tasks.encoded import Encoded
from fedp2eft.tasks.frozen_blocks import keeping_states, with_states

Indices = Sequence[int] | NDArray[np.int64]
RowsLoss = Callable[[NDArray[np.int64]], Tensor]


@dataclass(frozen=True)
class Scores:
    """What a model scores on one client's rows.

    Args:
        examples: Rows scored.
        correct: Rows classified right; None for a causal LM.
        loss: Mean cross-entropy in nats: per row of a classification, per response token of a
            causal LM.
        tokens: Response tokens scored, end tokens included; None for a classification.
        texts: Sums over the rows of what generated texts score (`text_scores.TEXT_SCORES`), by
            name; None where none were generated.
    """

    examples: int
    correct: int | None
    loss: float
    tokens: int | None = None
    texts: Mapping[str, float] | None = None

    @property
    def accuracy(self) -> float:
        """Share of rows classified right, 0 to 1; NaN where no row was classified."""
        return self.correct / self.examples if self.correct is not None and self.examples else NAN

    @property
    def perplexity(self) -> float:
        """exp(loss) per response token; NaN where no token was scored."""
        return math.exp(min(self.loss, 700.0)) if self.tokens else NAN

    def metrics(self) -> dict[str, int | float]:
        """Return the known ones by name: what travels, and what a cell keeps."""
        known = {"correct": self.correct, "tokens": self.tokens}
        return {
            "examples": self.examples,
            "loss": self.loss,
            **{name: value for name, value in known.items() if value is not None},
            **(self.texts or {}),
        }

    def __str__(self) -> str:
        if self.tokens is None:
            share = f"Accuracy {self.accuracy:.1%} ({self.correct} of {self.examples})"
            return f"{share}, loss {self.loss:.4f}"
        counted = f"{self.tokens} tokens of {self.examples} rows"
        text = f"Response loss {self.loss:.4f} ({counted}), perplexity {self.perplexity:.4g}"
        means = [
            f"{name} {value / self.examples:.4f}" for name, value in (self.texts or {}).items()
        ]
        return "\n".join([text, *([f"Generated: {', '.join(means)}"] if means else [])])

    def facts(self) -> dict[str, float | None]:
        """Return what a card reports of them, by name; None if no row was scored."""
        if self.tokens is None:
            return {"accuracy": self.accuracy if self.examples else None}
        return {"response_loss": self.loss if self.tokens else None}


NAN = float("nan")


@dataclass(frozen=True)
class Task(ABC):
    """A kind of rows, and how a model is trained and scored on them.

    Args:
        pad_id: Token id at padding positions.
        max_length: Longest input in tokens.
        device: Where batches go; `dataclasses.replace(task, device=…)` gives the task for another.
        vocabulary: Token ids that the model has embeddings for; None if that is not known.
        offset: Added to the logits of a classification in training and in prediction, one value per
            class: a client's label prior (`fedp2eft.tasks.label_prior`).
        temperature: What the logits are divided by before.
        states_mib: Memory for hidden states that frozen blocks give, in MiB: `with_states`.
    """

    pad_id: int
    max_length: int
    device: torch.device | str = "cpu"
    vocabulary: int | None = None
    offset: Tensor | None = field(default=None, compare=False, kw_only=True)
    temperature: float = field(default=1.0, compare=False, kw_only=True)
    states_mib: int = field(default=0, kw_only=True)

    # Tokens of one pass of packed rows: what it keeps for its backward pass grows with them.
    most_tokens: ClassVar[int] = 4096

    @abstractmethod
    def encode(
        self, tokenizer: Any, texts: Sequence[Sequence[Any]], answers: Sequence[Any]
    ) -> Encoded:
        """Tokenize rows.

        Args:
            tokenizer: A Hugging Face tokenizer.
            texts: One list per text column, all of the same length.
            answers: What a model shall answer, one per row: class ids, or texts.
        """

    @abstractmethod
    def padded(self, data: Encoded, indices: Indices, length: int | None) -> dict[str, Tensor]:
        """Return model inputs and `labels` of those rows, padded to that length or the longest."""

    def batch(self, data: Encoded, indices: Indices) -> dict[str, Tensor]:
        """Return model inputs and `labels` of those rows, padded to the longest of them."""
        return self.padded(data, indices, None)

    def with_states(self, model: nn.Module, data: Encoded) -> Encoded:
        """Return the rows with the states that enter the lowest trained block, where they are kept.

        Args:
            model: In the mode in which it will be used; it must not change meanwhile.
            data: The rows.
        """
        return with_states(model, data, self.batch, self.states_mib * 2**20)

    def keeping_states(self, model: nn.Module, data: Encoded) -> AbstractContextManager[int | None]:
        """Keep these states from passes over all rows that are run anyway: see `frozen_blocks`."""
        return keeping_states(model, data, self.states_mib * 2**20)

    def feature_batches(self, data: Encoded, batch_size: int) -> Iterable[dict[str, Tensor]]:
        """Return all rows in large batches of similar length, for ξ (profile `paper`)."""
        return (self.batch(data, rows) for rows in data.by_length(batch_size))

    def padded_batches(self, data: Encoded, batch_size: int) -> Iterable[dict[str, Tensor]]:
        """Return all rows in order, padded to `max_length`, for ξ (profile `reference`)."""
        for start in range(0, len(data), batch_size):
            rows = range(start, min(start + batch_size, len(data)))
            yield self.padded(data, rows, self.max_length)

    @abstractmethod
    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Return the task loss of a batch, float32."""

    def packed_loss(self, model: nn.Module, data: Encoded) -> RowsLoss | None:
        """Return the task loss of row indices, from one pass without padding, if possible.

        None where this model or device takes no packed rows.
        """
        return None

    @abstractmethod
    def score(self, model: nn.Module, data: Encoded, batch_size: int) -> Scores:
        """Return a model's scores on the rows; at least one row."""

    @abstractmethod
    def unscored(self) -> Scores:
        """Return the scores of a client without test rows."""
