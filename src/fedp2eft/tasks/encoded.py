"""One client's rows as token ids, kept flat so that many clients cost little memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedp2eft.errors import UserError, shortened


@dataclass(frozen=True)
class Encoded:
    """Rows of tokens with one label each.

    Args:
        tokens: Token ids of all rows, one after the other, int32.
        offsets: Where each row starts in `tokens`, and the end: n + 1 values, int64.
        labels: Class id per row, int64; 0 where there are no classes.
        types: Token type ids in the layout of `tokens`, where the model wants them.
        starts: Where each row's response starts, counted from the row's own start, int64; for a
            causal LM.
        dropped: Rows left out because their prompt alone fills the longest input.
        cut: Rows whose text or response was cut at the longest input.
        states: Hidden states of all tokens in the layout of `tokens`, tokens × width, that a frozen
            model has at block `first_block` (`tasks.frozen_blocks`).
        first_block: The block, from 0.
    """

    tokens: NDArray[np.int32]
    offsets: NDArray[np.int64]
    labels: NDArray[np.int64]
    types: NDArray[np.int32] | None = None
    starts: NDArray[np.int64] | None = None
    dropped: int = 0
    cut: int = 0
    states: Tensor | None = None
    first_block: int = 0

    @classmethod
    def from_rows(
        cls,
        rows: Sequence[Sequence[int]],
        labels: Sequence[int] | NDArray[np.int64],
        types: Sequence[Sequence[int]] | None = None,
        starts: Sequence[int] | NDArray[np.int64] | None = None,
    ) -> Encoded:
        """Pack rows of token ids."""
        lengths = np.fromiter((len(row) for row in rows), dtype=np.int64, count=len(rows))
        return cls(
            tokens=_flat(rows),
            offsets=np.concatenate([np.zeros(1, np.int64), lengths.cumsum()]),
            labels=np.asarray(labels, dtype=np.int64),
            types=None if types is None else _flat(types),
            starts=None if starts is None else np.asarray(starts, dtype=np.int64),
        )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens per row."""
        return np.diff(self.offsets)

    @property
    def first_targets(self) -> NDArray[np.int64]:
        """Each row's first position that a causal LM is trained to predict."""
        assert self.starts is not None
        # The first token of a row has nothing before it to be predicted from.
        return np.maximum(self.starts, 1)

    def places(self, indices: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        """Where the tokens of the given rows are in `tokens`, row by row."""
        return np.concatenate([np.arange(*self.offsets[i : i + 2]) for i in indices])

    def select(self, indices: Sequence[int] | NDArray[np.int64]) -> Encoded:
        """Return the given rows, in the given order, without `states`."""
        rows = [self.tokens[self.offsets[i] : self.offsets[i + 1]] for i in indices]
        types, chosen = self.types, np.asarray(indices, dtype=np.int64)
        return Encoded.from_rows(
            rows,  # type: ignore[arg-type]
            self.labels[chosen],
            None
            if types is None
            else [types[self.offsets[i] : self.offsets[i + 1]] for i in indices],  # type: ignore[misc]
            None if self.starts is None else self.starts[chosen],
        )

    def sample(self, tokens: int, seed: int) -> Encoded:
        """Return random rows in their order: as many as hold at most so many tokens, or one row.

        Args:
            tokens: Most tokens of the sample.
            seed: Which rows are drawn.
        """
        order = np.random.default_rng(seed).permutation(len(self))
        kept = int((self.lengths[order].cumsum() <= tokens).sum())
        return self if kept == len(self) else self.select(np.sort(order[: max(1, kept)]))

    def batch(
        self,
        indices: Sequence[int] | NDArray[np.int64],
        *,
        pad_id: int,
        device: torch.device | str = "cpu",
        length: int | None = None,
    ) -> dict[str, Tensor]:
        """Return model inputs of the given rows, right-padded to the longest of them.

        Args:
            indices: Row indices.
            pad_id: Token id at padding positions.
            device: Where the tensors go.
            length: Pad to this length instead.

        Returns:
            input_ids and attention_mask (rows × length), labels (rows), and token_type_ids where
            the rows have them; all int64. Where the rows have them also states (rows × length ×
            width, zeros at padding) and first_block (rows, int64).
        """
        chosen = np.asarray(indices, dtype=np.int64)
        lengths = self.lengths[chosen]
        width = int(length or lengths.max())
        mask = np.arange(width) < lengths[:, None]
        where = self.places(chosen)

        def padded(values: NDArray[np.int32], fill: int) -> Tensor:
            grid = np.full(mask.shape, fill, dtype=np.int64)
            grid[mask] = values[where]
            return torch.from_numpy(grid).to(device)

        inputs = {
            "input_ids": padded(self.tokens, pad_id),
            "attention_mask": torch.from_numpy(mask.astype(np.int64)).to(device),
            "labels": torch.from_numpy(self.labels[chosen]).to(device),
        }
        if self.types is not None:
            inputs["token_type_ids"] = padded(self.types, 0)
        if self.states is not None:
            real = torch.from_numpy(mask).to(self.states.device)
            states = self.states.new_zeros(*mask.shape, self.states.shape[-1])
            states[real] = self.states[torch.from_numpy(where).to(self.states.device)]
            inputs["states"] = states
            inputs["first_block"] = torch.full((len(chosen),), self.first_block)
        return inputs

    def parts(
        self, indices: Sequence[int] | NDArray[np.int64], pass_tokens: int
    ) -> list[tuple[NDArray[np.int64], float]]:
        """Return a mini-batch as parts of similar length, so that little padding is computed.

        Found among all ways to cut the rows in order of length: the least positions, padding
        included, where every part costs `pass_tokens` more.

        Args:
            indices: Row indices of the mini-batch.
            pass_tokens: What one more pass through the model costs, in positions.

        Returns:
            Row indices of each part, longest first, and its share of the mini-batch's mean loss.
        """
        order = self._longest_first(indices)
        lengths = self.lengths[order]
        # least[i] is the cost of the first i rows, start[i] where the last part of them begins
        least, start = np.zeros(len(order) + 1), np.zeros(len(order) + 1, np.int64)
        for end in range(1, len(order) + 1):
            cost = least[:end] + lengths[:end] * np.arange(end, 0, -1) + pass_tokens
            start[end] = cost.argmin()
            least[end] = cost[start[end]]
        cuts = [len(order)]
        while cuts[-1]:
            cuts.append(int(start[cuts[-1]]))
        return self._shared([order[low:high] for high, low in reversed(list(pairwise(cuts)))])

    def _shared(self, parts: Sequence[NDArray[np.int64]]) -> list[tuple[NDArray[np.int64], float]]:
        """Return parts of a mini-batch with their share of its mean loss, without empty ones."""
        weights = np.array([self.weights(part).sum() for part in parts])
        shares = (weights / weights.sum()).tolist()
        return [(part, share) for part, share in zip(parts, shares, strict=True) if share]

    def _longest_first(self, indices: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        """Return row indices by length, longest first."""
        chosen = np.asarray(indices, dtype=np.int64)
        return chosen[np.argsort(-self.lengths[chosen], kind="stable")]

    def passes(
        self, indices: Sequence[int] | NDArray[np.int64], most: int
    ) -> list[tuple[NDArray[np.int64], float]]:
        """Return a mini-batch as the fewest passes of at most so many tokens each.

        Args:
            indices: Row indices of the mini-batch.
            most: Tokens of a pass; a row alone may be longer.

        Returns:
            Row indices of each pass, longest first, and its share of the mini-batch's mean loss.
        """
        order = self._longest_first(indices)
        passes = -(-int(self.lengths[order].sum()) // most)
        ends = self.lengths[order].cumsum()
        # Of about equal size, so that no pass is left with a row or two.
        number = (ends - 1) * passes // ends[-1]
        return self._shared([order[number == i] for i in range(passes)])

    def weights(self, indices: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        """Return each row's weight in a batch's mean loss: one, or its response's tokens."""
        chosen = np.asarray(indices, dtype=np.int64)
        if self.starts is None:
            return np.ones(len(chosen), np.int64)
        return self.lengths[chosen] - self.first_targets[chosen]

    def by_length(self, batch_size: int) -> Iterator[NDArray[np.int64]]:
        """Yield row indices in batches of similar length, longest first (memory peaks at once)."""
        order = self._longest_first(np.arange(len(self)))
        for start in range(0, len(order), batch_size):
            yield order[start : start + batch_size]


def _flat(rows: Sequence[Sequence[int]]) -> NDArray[np.int32]:
    if not len(rows):
        return np.empty(0, np.int32)
    return np.concatenate([np.asarray(row, dtype=np.int32) for row in rows])


def epoch_batches(
    rows: int, epochs: int, batch_size: int, seed: int
) -> Iterator[NDArray[np.int64]]:
    """Yield mini-batches of a local run: each epoch shuffles all rows, last batch shorter."""
    generator = np.random.default_rng(seed)
    for _ in range(epochs):
        order = generator.permutation(rows)
        for start in range(0, rows, batch_size):
            yield order[start : start + batch_size]


def check_tokens(rows: Sequence[Sequence[int]], size: int | None, tokenizer: Any) -> None:
    """Raise `UserError` if a row has a token that the model has no embedding for."""
    largest = max((max(row, default=0) for row in rows), default=0)
    if size is not None and largest >= size:
        token = shortened(str(tokenizer.convert_ids_to_tokens(int(largest))))
        raise UserError(
            f"The tokenizer gives {token} the id {largest}, and the model has embeddings for "
            f"{size} tokens: resize the model's embeddings, or use its own tokenizer."
        )
