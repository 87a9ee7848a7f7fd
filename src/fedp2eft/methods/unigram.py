"""The client's unigram: what the frequencies of its tokens say, added to the base's predictions.

    z(v) = f(v) + log p(v) − log q(v)         p ∝ n(v) + ½,   q ∝ m(v) + ½

f are the logits of a token given what precedes it, n counts the tokens of the client's training
responses, and m is how often the base expects each of them there, the sum of its predictions at the
same positions. n and m have one sum, so the offset is log((n + ½) / (m + ½)).

It is to a causal LM what the label prior is to a classifier (`fedp2eft.tasks.label_prior`), and
what an adapter must beat to have learned more than which tokens are frequent. Nothing is trained
and no adapter is made: most heads have no bias that could carry the offset.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fedp2eft.client.side import ClientSide, Outcome
from fedp2eft.errors import UserError
from fedp2eft.modes import in_mode
from fedp2eft.tasks.causal_lm import IGNORED, CausalLM
from fedp2eft.tasks.encoded import Encoded


def unigram(client: ClientSide, rank: int) -> Outcome:
    """Score the base with the client's unigram on its logits; the budget plays no part."""
    if not isinstance(client.task, CausalLM):
        raise UserError(
            "Method unigram is for causal LMs, and this task has classes: leave it out."
        )
    model = client.bt.model
    with client.bt.off(), added(model, offset(*token_counts(client.task, model, client.train))):
        return Outcome(client.score(model), None)


def token_counts(task: CausalLM, model: Any, data: Encoded) -> tuple[Tensor, Tensor]:
    """Return n and m of the response tokens of some rows, V values each, float64."""
    found = torch.zeros(2, model.get_output_embeddings().weight.shape[0], dtype=torch.float64)
    with torch.inference_mode(), in_mode(model, training=False):
        for rows in data.by_length(1) if len(data) else ():
            batch = task.batch(data, rows)
            tokens = batch.pop("labels")[0, 1:]
            response = tokens != IGNORED
            logits = model(**batch, use_cache=False).logits[0, :-1]
            found[0] += torch.bincount(tokens[response], minlength=found.shape[1]).cpu()
            found[1] += logits[response].float().softmax(dim=1).sum(dim=0).cpu()
    return found[0], found[1]


def offset(counts: Tensor, expected: Tensor) -> Tensor:
    """Return log p − log q per token; zeros for a client without training rows."""
    return ((counts + 0.5) / (expected + 0.5)).log().float()


@contextmanager
def added(model: Any, shift: Tensor) -> Iterator[None]:
    """Add an offset to a model's logits, V values, until the end of the block.

    Raises:
        UserError: The model bounds its logits, so that nothing can be added to them at its head.
    """
    if getattr(model.config.get_text_config(), "final_logit_softcapping", None):
        raise UserError("Method unigram needs logits as its head gives them: leave it out.")
    head: nn.Module = model.get_output_embeddings()

    def add(_module: nn.Module, _inputs: Any, logits: Tensor) -> Tensor:
        return logits.float() + shift.to(logits.device)

    handle = head.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()
