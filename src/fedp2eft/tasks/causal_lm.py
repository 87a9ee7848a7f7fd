"""Instruction-tuned language models: a prompt in, the cross-entropy of its response out.

Loss on the response alone, its end token included: labels are -100 at the prompt and at padding.
The loss of a batch is the mean over its response tokens. Under accumulation the mini-batches of a
step weigh the same, however many response tokens each has (a mean of means, as `client.descend`
does for every task).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from fedp2eft.errors import UserError
from fedp2eft.modes import in_mode
from fedp2eft.tasks.encoded import Encoded, check_tokens
from fedp2eft.tasks.frozen_blocks import run
from fedp2eft.tasks.generation import Question
from fedp2eft.tasks.packed import can_pack_causal, response_logits
from fedp2eft.tasks.prompts import Prompts
from fedp2eft.tasks.task import Indices, RowsLoss, Scores, Task

IGNORED = -100


@dataclass(frozen=True)
class CausalLM(Task):
    """Prompt and response, one of each per row.

    `max_length` is of a prompt with its response. A longer response is cut; a row whose prompt
    leaves no room for a response is dropped. Both are counted.
    """

    # Logits over the whole vocabulary are kept, too.
    most_tokens: ClassVar[int] = 1024

    def encode(
        self, tokenizer: Any, texts: Sequence[Sequence[Any]], answers: Sequence[Any]
    ) -> Encoded:
        """Tokenize prompts and responses.

        Args:
            tokenizer: A Hugging Face tokenizer.
            texts: One list per text column; several columns make one prompt, a blank line between
                them. A row may also be a conversation, a list of {"role", "content"}.
            answers: The responses; of a conversation its last turn is the response.

        Returns:
            Rows of prompt, response and end token, with the start of each response. A response that
            was cut has no end token: it does not end there.
        """
        prompts = Prompts(tokenizer, self.vocabulary)
        rows, starts, cut = [], [], 0
        for asked in self.questions(prompts, texts, answers):
            row = [*asked.tokens, *prompts.response(asked.reference)]
            cut += len(row) > self.max_length
            rows.append(row[: self.max_length])
            starts.append(len(asked.tokens))
        check_tokens(rows, self.vocabulary, tokenizer)
        encoded = Encoded.from_rows(rows, [0] * len(rows), starts=starts)
        return replace(encoded, dropped=len(answers) - len(rows), cut=cut)

    def questions(
        self, prompts: Prompts, texts: Sequence[Sequence[Any]], answers: Sequence[Any]
    ) -> Iterator[Question]:
        """Yield the rows that `encode` keeps, with their whole responses."""
        for *parts, answer in zip(*texts, answers, strict=True):
            chat = not isinstance(answer, str)
            said = [turn["content"] for turn in answer] if chat else [*parts, answer]
            shown = "\n\n".join(said[:-1])
            tokens = prompts.prompt(answer[:-1] if chat else shown)
            if len(tokens) < self.max_length:
                yield Question(shown, tokens, said[-1])

    def padded(self, data: Encoded, indices: Indices, length: int | None) -> dict[str, Tensor]:
        """Return model inputs, padded on the right; `labels` of that shape.

        labels: The token at every position of a response, -100 elsewhere.
        """
        batch = data.batch(indices, pad_id=self.pad_id, device=self.device, length=length)
        assert data.starts is not None
        starts = torch.from_numpy(data.starts[np.asarray(indices, dtype=np.int64)])
        places = torch.arange(batch["input_ids"].shape[1])
        behind = (places >= starts.unsqueeze(1)).to(self.device)
        response = behind & batch["attention_mask"].bool()
        batch["labels"] = torch.where(response, batch["input_ids"], IGNORED)
        return batch

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Return the mean cross-entropy over the response tokens of a batch, float32."""
        return F.cross_entropy(*self._predictions(model, batch))

    def packed_loss(self, model: nn.Module, data: Encoded) -> RowsLoss | None:
        """Return `loss` of rows by index, without padding: on a CPU, for Llama's kind."""
        if not self._packs(model, data):
            return None
        rows = cache(lambda: self.with_states(model, data))  # of the mode it is in by then

        def loss_of(indices: NDArray[np.int64]) -> Tensor:
            logits, targets, _order = response_logits(model, rows(), indices)
            return F.cross_entropy(logits.float(), targets)

        return loss_of

    def _packs(self, model: nn.Module, data: Encoded) -> bool:
        return torch.device(self.device).type == "cpu" and can_pack_causal(model, data)

    def _predictions(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return logits (tokens × vocabulary, float32) and targets (tokens) of all response tokens.

        Logits are asked for from the earliest response of the batch on: those of the prompts alone
        would often be most of the memory.
        """
        labels = batch["labels"]
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        response = labels != IGNORED
        wanted = labels.shape[1] - int(response.any(dim=0).int().argmax()) + 1
        # A model that is asked for too many gives all; one that knows its logits already does too.
        out = run(model, inputs, use_cache=False, logits_to_keep=wanted)
        logits: Tensor = out.logits[:, -wanted:]
        targets = labels[:, -logits.shape[1] + 1 :]
        known = targets != IGNORED
        return logits[:, :-1][known].float(), targets[known]

    @torch.inference_mode()
    def losses(self, model: nn.Module, data: Encoded, batch_size: int) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy summed over each row's response, and its tokens, in row order.

        Returns:
            Nats (float64) and tokens (int64), one per row, on the CPU.

        Raises:
            UserError: There are no rows.
        """
        if not len(data):
            raise UserError("There are no rows to score: give the client's test split some text.")
        sums, tokens = torch.zeros(len(data), dtype=torch.float64), torch.zeros(len(data)).long()
        with in_mode(model, training=False):
            packs, data = self._packs(model, data), self.with_states(model, data)
            for chosen in data.by_length(batch_size):
                if packs:
                    logits, targets, chosen = response_logits(model, data, chosen)
                    logits = logits.float()
                else:
                    logits, targets = self._predictions(model, self.batch(data, chosen))
                each = F.cross_entropy(logits, targets, reduction="none").cpu()
                counts = torch.from_numpy(data.weights(chosen))
                tokens[torch.from_numpy(chosen)] = counts
                parts = torch.split(each.double(), counts.tolist())
                sums[torch.from_numpy(chosen)] = torch.stack([part.sum() for part in parts])
        return sums, tokens

    def score(self, model: nn.Module, data: Encoded, batch_size: int) -> Scores:
        """Return the mean loss per response token; every token weighs the same."""
        sums, tokens = self.losses(model, data, batch_size)
        total = int(tokens.sum())
        return Scores(len(data), None, float(sums.sum()) / total, total)

    def unscored(self) -> Scores:
        """Return the scores of a client without test rows."""
        return Scores(0, None, 0.0, 0)
