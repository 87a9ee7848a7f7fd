"""Hidden states that enter the lowest trained block, computed once per text.

Where adapters sit on the upper blocks alone, the embeddings and the blocks below give the same
hidden states in every epoch, for every method and in every scoring: constants of the text. They are
kept, and a forward pass starts from them. Loss, gradients and logits are the same up to rounding.

When this is allowed (`first_trained`, `may_keep`): the embeddings and the blocks below hold no
adapter and no parameter that requires gradients; the model draws no dropout; the architecture is
one of those listed here. States are kept per base model, under a key that names the text (its
tokens), the block, autocast, and the values of every weight below, so neither another text nor
another base can be given them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedp2eft.modes import has_dropout, with_values
from fedp2eft.tasks.encoded import Encoded

Batch = dict[str, Tensor]
BATCH_SIZE = 32
"""Rows at once. Fixed, so that a text has the same states, to the bit, whoever asks first."""
# Where a model keeps its embeddings, and its blocks in the order in which they run.
_ENCODER = ("embeddings", "encoder", "layer")
_DECODER = ("embed_tokens", "", "layers")
_PLACES = dict.fromkeys(("bert", "camembert", "roberta", "xlm-roberta"), _ENCODER)
DECODERS = ("llama", "mistral", "qwen2", "qwen3")
_PLACES |= dict.fromkeys(DECODERS, _DECODER)
# Rotary embeddings that depend on the longest row met so far.
_GROWING = ("dynamic", "longrope")


@dataclass(frozen=True)
class _Body:
    """The embeddings and the blocks of a model.

    Args:
        trunk: The model without its head.
        embeddings: Name of the embeddings in `trunk`.
        holder: Holds the blocks.
        blocks: Their name in `holder`.
    """

    trunk: Any
    embeddings: str
    holder: Any
    blocks: str

    @classmethod
    def of(cls, model: nn.Module) -> _Body | None:
        """None for an architecture that is not listed."""
        whole = plain(model)
        places = _PLACES.get(str(getattr(getattr(whole, "config", None), "model_type", "")))
        if places is None:
            return None
        trunk, (embeddings, holder, blocks) = whole.base_model, places
        if grows(trunk):
            return None
        return cls(trunk, embeddings, getattr(trunk, holder) if holder else trunk, blocks)

    def below(self, first: int) -> list[nn.Module]:
        """The embeddings and the first blocks."""
        return [getattr(self.trunk, self.embeddings), *getattr(self.holder, self.blocks)[:first]]

    @contextmanager
    def from_block(self, first: int, states: Tensor) -> Iterator[None]:
        """Let these states enter block `first` in the next forward pass, whatever its tokens."""
        upper = getattr(self.holder, self.blocks)[first:]
        blocks = nn.ModuleList([*(_Same() for _ in range(first)), *upper])
        with (
            with_values(self.trunk, **{self.embeddings: _Given(states)}),
            with_values(self.holder, **{self.blocks: blocks}),
        ):
            yield

    def states(self, first: int, inputs: Batch) -> Tensor:
        """What enters block `first`; nothing from there on is run.

        Not even without gradients: inside `parametrize.cached` that would leave adapted weights
        without gradients to the pass that follows.
        """
        blocks = nn.ModuleList([*getattr(self.holder, self.blocks)[:first], _End()])
        try:
            with with_values(self.holder, **{self.blocks: blocks}):
                self.trunk(**inputs, use_cache=False)
        except _ReachedError as reached:
            return reached.states
        raise RuntimeError(f"The model has run no block {first}.")


class _Same(nn.Module):
    """A block that gives what it gets."""

    def forward(self, states: Tensor, *_args: Any, **_options: Any) -> Tensor:
        return states


class _ReachedError(Exception):
    """The states that `_End` gets."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states


class _End(nn.Module):
    """A block that ends the pass."""

    def forward(self, states: Tensor, *_args: Any, **_options: Any) -> Tensor:
        raise _ReachedError(states)


class _Given(nn.Module):
    """Embeddings that give the same states whatever they are asked."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self._states = states

    def forward(self, *_args: Any, **_options: Any) -> Tensor:
        return self._states


def grows(trunk: nn.Module) -> bool:
    """Return whether rotary embeddings depend on what else is in a batch."""
    return getattr(getattr(trunk, "rotary_emb", None), "rope_type", None) in _GROWING


def first_trained(model: nn.Module) -> int:
    """Return the number of the lowest block with anything that is trained or adapted, from 0.

    0 also if the embeddings are trained, or the architecture is not known. An adapter counts where
    it is switched off, too. The last block is never below: some tasks cut its inputs.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer  # takes a second

    body = _Body.of(model)
    if body is None:
        return 0
    embeddings, *blocks = body.below(len(getattr(body.holder, body.blocks)))

    def trained(part: nn.Module) -> bool:
        adapted = any(isinstance(module, BaseTunerLayer) for module in part.modules())
        return adapted or any(parameter.requires_grad for parameter in part.parameters())

    if trained(embeddings):
        return 0
    frozen = (number for number, block in enumerate(blocks) if trained(block))
    return min(next(frozen, len(blocks)), len(blocks) - 1)


def may_keep(model: nn.Module) -> bool:
    """Whether states are constants in the model's present mode."""
    if getattr(model, "is_activation_checkpointing", False):
        return False
    return not (model.training and has_dropout(plain(model)))


def run(model: nn.Module, inputs: Batch, **options: Any) -> Any:
    """The model's output, from the states in the inputs if there are any.

    Args:
        model: With or without an adapter around it.
        inputs: Of `Encoded.batch`, without labels.
        options: Further arguments of the model.
    """
    if "states" not in inputs:
        return model(**inputs, **options)
    inputs = dict(inputs)
    states, first = inputs.pop("states"), int(inputs.pop("first_block")[0])
    body = _Body.of(model)
    if body is None or not may_keep(model):
        raise RuntimeError("These states are another model's, or of another mode.")
    with body.from_block(first, states):
        return model(**inputs, **options)


def with_states(
    model: nn.Module,
    data: Encoded,
    batch_of: Callable[[Encoded, NDArray], Batch],  # type: ignore[type-arg]
    limit: int,
) -> Encoded:
    """Return rows with the states that enter the model's lowest trained block.

    The same rows where that is not allowed, saves nothing, or takes too much memory. The model must
    not change while they are used.

    Args:
        model: With or without an adapter around it, in the mode in which it will be used.
        data: The rows.
        batch_of: Gives model inputs of some rows, and labels.
        limit: Most bytes that are kept for all texts of this base model. Above it, the texts that
            were not used for longest are computed anew when they come again.
    """
    place = _Place.of(model, data, limit)
    if place is None:
        return data
    states = place.kept.get(place.key)
    if states is None:
        states = _compute(place, data, batch_of)
        place.kept.put(place.key, states, limit)
    return replace(data, states=states, first_block=place.first)


@contextmanager
def keeping_states(model: nn.Module, data: Encoded, limit: int) -> Iterator[int | None]:
    """Keep the states that `with_states` would compute, from passes that are run anyway.

    While this is open, all rows go through the whole model, once and in the order of
    `Encoded.by_length`. What it yields is the size of their batches, which decides the bits; None
    where nothing is kept.

    Args:
        model: With or without an adapter around it, in the mode in which it will be used.
        data: The rows.
        limit: Most bytes that are kept for all texts of this base model.
    """
    place = _Place.of(model, data, limit)
    if place is None:
        yield None
        return
    if place.kept.get(place.key) is not None:
        yield BATCH_SIZE
        return
    gathered, batches = _Gathered(data), data.by_length(BATCH_SIZE)

    def gather(_block: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        gathered.add(next(batches), inputs[0])

    block = getattr(place.body.holder, place.body.blocks)[place.first]
    handle = block.register_forward_pre_hook(gather)
    try:
        yield BATCH_SIZE
    finally:
        handle.remove()
    place.kept.put(place.key, gathered.states, limit)


@dataclass(frozen=True)
class _Place:
    """Where the states of some rows are kept.

    Args:
        body: The model.
        first: The block that they enter, from 0.
        kept: All states of this base model.
        key: Theirs.
    """

    body: _Body
    first: int
    kept: _Kept
    key: object

    @classmethod
    def of(cls, model: nn.Module, data: Encoded, limit: int) -> _Place | None:
        """None where keeping them is not allowed, saves nothing, or takes too much memory."""
        whole = plain(model)
        first = first_trained(model) if limit and len(data) and may_keep(model) else 0
        if not first:
            return None
        width, embedding = whole.config.hidden_size, whole.get_input_embeddings().weight
        if len(data.tokens) * width * embedding.element_size() > limit:
            return None
        body = _Body.of(model)
        assert body is not None
        weights = _digest_of_weights(body.below(first), embedding, data)
        key = (_digest_of(data), first, weights, *_autocast(embedding))
        return cls(body, first, _KEPT.setdefault(whole, _Kept()), key)


# Not in inference mode, even if a scoring asks for them first: training cannot use such tensors.
@torch.inference_mode(False)
@torch.no_grad()
def _compute(
    place: _Place,
    data: Encoded,
    batch_of: Callable[[Encoded, NDArray], Batch],  # type: ignore[type-arg]
) -> Tensor:
    """States of all tokens, in their order: tokens × width."""
    gathered = _Gathered(data)
    for rows in data.by_length(BATCH_SIZE):
        batch = batch_of(data, rows)
        batch.pop("labels")
        gathered.add(rows, place.body.states(place.first, batch))
    return gathered.states


class _Gathered:
    """States of all tokens in their order, tokens × width, from those of batches."""

    states: Tensor

    def __init__(self, data: Encoded) -> None:
        self._data = data

    @torch.inference_mode(False)
    @torch.no_grad()
    def add(self, rows: NDArray[np.int64], found: Tensor) -> None:
        """Take the states of some rows, rows × length × width, padded at the end."""
        data = self._data
        if not hasattr(self, "states"):
            shape = len(data.tokens), found.shape[-1]
            self.states = torch.empty(shape, dtype=found.dtype, device=found.device)
        real = np.arange(found.shape[1]) < data.lengths[rows][:, None]
        self.states[data.places(rows)] = found[torch.from_numpy(real).to(found.device)]


class _Kept:
    """States of several texts, the least recently used first."""

    def __init__(self) -> None:
        self._states: OrderedDict[object, Tensor] = OrderedDict()
        self._bytes = 0

    def get(self, key: object) -> Tensor | None:
        if key in self._states:
            self._states.move_to_end(key)
        return self._states.get(key)

    def put(self, key: object, states: Tensor, limit: int) -> None:
        self._states[key] = states
        self._bytes += states.nbytes
        while self._bytes > limit:
            _, oldest = self._states.popitem(last=False)
            self._bytes -= oldest.nbytes


_KEPT: WeakKeyDictionary[nn.Module, _Kept] = WeakKeyDictionary()


def _digest_of(data: Encoded) -> bytes:
    """Of all that the embeddings read, and of where each row ends."""
    digest = blake2b(data.offsets.tobytes(), digest_size=16)
    digest.update(data.tokens.tobytes())
    if data.types is not None:
        digest.update(b"types" + data.types.tobytes())
    return digest.digest()


def _autocast(like: Tensor) -> tuple[object, ...]:
    """Return what decides the dtype of a product."""
    device = like.device.type
    enabled = torch.is_autocast_enabled(device)
    return enabled, torch.get_autocast_dtype(device) if enabled else like.dtype


def _digest_of_weights(below: Iterable[nn.Module], table: Tensor, data: Encoded) -> bytes:
    """Return a digest that changes with the weights.

    Autograd counts changes in place, but not those of `.data` (with which PEFT merges adapters), so
    the values count too: as the exact sum of each row's bits, which takes a thousandth of the time
    of a pass. Of the token embeddings, which may be most of the model, the text's rows are enough.
    """
    digest = blake2b(digest_size=16)
    tokens = torch.from_numpy(np.unique(data.tokens)).long().to(table.device)
    for tensor in chain.from_iterable((*m.parameters(), *m.buffers()) for m in below):
        digest.update(repr((id(tensor), tensor.data_ptr(), tensor._version)).encode())
        values = tensor.detach()[tokens] if tensor is table else tensor.detach()
        if values.numel():
            digest.update(_row_sums(values).cpu().numpy().tobytes())
    return digest.digest()


def _row_sums(values: Tensor) -> Tensor:
    """Each row of a tensor as whole numbers, added up in int64."""
    rows = values.reshape(len(values) if values.dim() else 1, -1)
    if rows.storage_offset() or not rows.is_contiguous():
        rows = rows.clone(memory_format=torch.contiguous_format)
    whole = rows.shape[1] * rows.element_size() % 4 == 0
    return rows.view(torch.int32 if whole else torch.uint8).sum(dim=1)


def plain(model: Any) -> Any:
    """Return the model inside an adapter's wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
