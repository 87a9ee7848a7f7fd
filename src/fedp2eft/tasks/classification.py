"""Text classification: tokens in, cross-entropy and accuracy out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from fedp2eft.errors import UserError, shortened
from fedp2eft.modes import in_mode
from fedp2eft.tasks.encoded import Encoded, check_tokens
from fedp2eft.tasks.first_position import only_first_position
from fedp2eft.tasks.frozen_blocks import run
from fedp2eft.tasks.packed import can_pack, pack, packed_logits
from fedp2eft.tasks.task import Indices, RowsLoss, Scores, Task


@dataclass(frozen=True)
class Classification(Task):
    """Sequence classification with one label per row.

    Args:
        whole: Pad every batch to `max_length`.
    """

    whole: bool = False

    def encode(
        self,
        tokenizer: Any,
        texts: Sequence[Sequence[Any]],
        answers: Sequence[int] | NDArray[np.int64],
    ) -> Encoded:
        """Tokenize rows of one text, of two as a pair, or of more as one text.

        Args:
            tokenizer: A Hugging Face tokenizer.
            texts: One list per text column, all of the same length. Models know pairs and no more
                than that: three or more are joined with a blank line between them, as `CausalLM`
                joins them.
            answers: Class ids.
        """
        if not len(answers):
            return Encoded.from_rows([], [])
        if len(texts) > 2:
            texts = [["\n\n".join(parts) for parts in zip(*texts, strict=True)]]
        wanted = tokenizer(
            *[list(column) for column in texts],
            truncation=True,
            max_length=self.max_length,
            return_attention_mask=False,
        )
        if not any(wanted["input_ids"]):
            shown = shortened(str(texts[0][0]), 40)
            raise UserError(
                f"The tokenizer produces no token for any text (the first: {shown}): it is not "
                "this model's, or knows none of the words."
            )
        # A text without any token (a decoder's tokenizer adds none) becomes one padding token.
        rows = [row or [self.pad_id] for row in wanted["input_ids"]]
        types = wanted.get("token_type_ids")
        check_tokens(rows, self.vocabulary, tokenizer)
        encoded = Encoded.from_rows(rows, answers, types and [each or [0] for each in types])
        # Only fast tokenizers tell a row that was cut from one that just fits.
        full = [n for n, row in enumerate(rows) if len(row) >= self.max_length]
        known = wanted.encodings or ()
        return replace(encoded, cut=sum(bool(known[n].overflowing) for n in full if known))

    def padded(self, data: Encoded, indices: Indices, length: int | None) -> dict[str, Tensor]:
        """Return model inputs, padded to that length, or to `max_length` if `whole`."""
        width = self.max_length if self.whole else length
        return data.batch(indices, pad_id=self.pad_id, device=self.device, length=width)

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Return the mean cross-entropy of a batch, float32."""
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        with only_first_position(model):
            logits: Tensor = run(model, inputs).logits
        return F.cross_entropy(self.adjusted(logits), batch["labels"])

    def adjusted(self, logits: Tensor) -> Tensor:
        """Return a model's logits in float32, with the temperature and the offset."""
        logits = logits.float()
        if self.temperature != 1:
            logits = logits / self.temperature
        return logits if self.offset is None else logits + self.offset.to(logits.device)

    def packed_loss(self, model: nn.Module, data: Encoded) -> RowsLoss | None:
        """Return `loss` of row indices, without padding: on a CPU, for encoders like BERT."""
        if torch.device(self.device).type != "cpu" or not can_pack(model):
            return None

        rows = cache(lambda: self.with_states(model, data))  # of the mode it is in by then

        def loss_of(indices: NDArray[np.int64]) -> Tensor:
            inputs, packing, order = pack(rows(), indices)
            logits = packed_logits(model, inputs, packing)
            return F.cross_entropy(self.adjusted(logits), torch.from_numpy(data.labels[order]))

        return loss_of

    @torch.inference_mode()
    def logits(self, model: nn.Module, data: Encoded, batch_size: int) -> Tensor:
        """Return the logits of every row in row order: rows × classes, float32 on the CPU.

        Raises:
            UserError: There are no rows.
        """
        if not len(data):
            raise UserError("There are no rows to score: give the client's test split some text.")
        with in_mode(model, training=False):
            data = self.with_states(model, data)
            parts, rows = [], []
            for chosen in data.by_length(batch_size):
                batch = self.batch(data, chosen)
                batch.pop("labels")
                with only_first_position(model):
                    parts.append(self.adjusted(run(model, batch).logits).cpu())
                rows.append(torch.from_numpy(chosen))
        order = torch.cat(rows)
        result = torch.empty(len(data), parts[0].shape[1])
        result[order] = torch.cat(parts)
        return result

    def score(self, model: nn.Module, data: Encoded, batch_size: int) -> Scores:
        """Return accuracy and loss of `model` on the rows."""
        return self.scores_of(self.logits(model, data, batch_size), data)

    def scores_of(self, logits: Tensor, data: Encoded) -> Scores:
        """Return accuracy and loss of logits, rows × classes, in row order."""
        labels = torch.from_numpy(data.labels)
        correct = int((logits.argmax(dim=1) == labels).sum())
        return Scores(len(data), correct, float(F.cross_entropy(logits, labels)))

    def unscored(self) -> Scores:
        """Return the scores of a client without test rows."""
        return Scores(0, 0, 0.0)
