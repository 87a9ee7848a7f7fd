"""How a model, its tokenizer and the data's classes fit together: each is decided here, once.

* the padding token: the tokenizer chooses it (`choose_padding`), the model's config takes it over
  (`take_padding`);
* the longest input, as the architecture means it (`longest_input`);
* the order of the classes: a trained head is matched to the data's by name (`name_classes`).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fedp2eft.errors import UserError, shortened

_POSITIONS = re.compile(r"(^|[._])(position_embeddings?|embed_positions)$")
_NO_TEXT = re.compile(r"vision|visual|image|audio")
_NO_NAME = re.compile(r"LABEL_\d+")


def vocabulary_size(config: Any) -> int | None:
    """Return how many token ids the model has embeddings for; None if any id will do (CANINE)."""
    size = getattr(config.get_text_config(), "vocab_size", None)
    return size if isinstance(size, int) and size > 0 else None


def choose_padding(tokenizer: Any, size: int | None) -> None:
    """Give a tokenizer a padding token that its model can read.

    It stays the tokenizer's own, if there is one and the model has an embedding for it. Otherwise
    the end of text takes its place, or the first token of the vocabulary if there is no end.

    Args:
        tokenizer: Changed in place.
        size: Token ids that the model knows, from `vocabulary_size`.
    """
    own = tokenizer.pad_token_id
    if own is None or (size is not None and own >= size):
        end = tokenizer.eos_token_id
        usable = end is not None and (size is None or end < size)
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(end if usable else 0)


def take_padding(model: Any, tokenizer: Any) -> None:
    """Set the padding token of a model's config, and of its text part, to the tokenizer's.

    A decoder that classifies reads its last token that is no padding, and finds that by the config.
    Models that count their positions from the padding token's id (RoBERTa's kind) keep their own:
    another id would move every position.
    """
    if _position_offset(model):
        return
    for config in (model.config, model.config.get_text_config()):
        config.pad_token_id = tokenizer.pad_token_id


def longest_input(model: nn.Module) -> int | None:
    """Return the most tokens that a model reads; None if its architecture sets no limit.

    Learned positions behind the padding token's id (RoBERTa, XLM-R, CamemBERT, MPNet) are fewer
    than the config's number; relative ones (DeBERTa, T5) have no end.
    """
    config: Any = model.config
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return None
    relative = getattr(text, "relative_attention", False)
    if relative and not getattr(text, "position_biased_input", True):
        return None
    tables = [len(table.weight) for table in _position_tables(model)]
    return min([limit, *tables]) - _position_offset(model)


def _position_tables(model: nn.Module) -> list[Any]:
    """Return the learned positions of a model's text; none if it computes them."""
    return [
        module
        for name, module in model.named_modules()
        if _POSITIONS.search(name) and not _NO_TEXT.search(name) and hasattr(module, "weight")
    ]


def _position_offset(model: nn.Module) -> int:
    """Return how many positions at the start of the table no token gets."""
    paddings = [getattr(table, "padding_idx", None) for table in _position_tables(model)]
    return max((padding + 1 for padding in paddings if padding is not None), default=0)


def name_classes(model: Any, labels: Sequence[str], trained: bool, name: str) -> None:
    """Give a classifier the data's class names, in the data's order.

    A trained head whose classes have names is matched by them: its rows are put into the data's
    order. Names are compared in NFC, stripped, and without case where that is unambiguous. Generic
    names (LABEL_0, …) say nothing: such a head is taken as it is.

    Args:
        model: A classifier for as many classes as there are labels.
        labels: The data's class names in the order of their ids.
        trained: Whether the head was loaded, not drawn.
        name: The model's, for the error.

    Raises:
        UserError: The head has other class names than the data.
    """
    own = class_names(model.config)
    if trained and not is_generic(own):
        order = _matching(own, labels)
        if order is None:
            raise UserError(
                f"{name} is trained for the classes {_listed(own)}, and the data has "
                f"{_listed(labels)}: name the data's classes as the model does, or use the base "
                "model without a head."
            )
        if order != list(range(len(labels))):
            _permute_head(model, order)
    model.config.id2label = dict(enumerate(labels))
    model.config.label2id = {label: i for i, label in enumerate(labels)}


def class_names(config: Any) -> tuple[str, ...]:
    """Return a classifier's class names in the order of its outputs."""
    names: Mapping[Any, Any] = config.id2label or {}
    return tuple(str(names[i]) for i in sorted(names))


def is_generic(names: Sequence[str]) -> bool:
    """Return whether these are the names that transformers makes up."""
    return all(_NO_NAME.fullmatch(name) for name in names)


def _matching(own: Sequence[str], labels: Sequence[str]) -> list[int] | None:
    """Return the position of every label among the model's names; None if they differ."""
    for key in (_plain, lambda name: _plain(name).casefold()):
        there = {key(name): i for i, name in enumerate(own)}
        wanted = [key(label) for label in labels]
        if len(there) == len(own) == len(set(wanted)) and set(wanted) == set(there):
            return [there[label] for label in wanted]
    return None


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name).strip()


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(shortened(name) for name in names[:20])
    return shown + (f" … ({len(names)} in all)" if len(names) > 20 else "")


def _permute_head(model: Any, order: list[int]) -> None:
    """Put the rows of a classifier's last layer into another order."""
    inside = model.base_model_prefix + "."
    heads = [
        module
        for name, module in model.named_modules()
        if getattr(module, "out_features", None) == len(order) and not name.startswith(inside)
    ]
    head = heads[-1]  # the layers of a head stand in the order in which they are computed
    with torch.no_grad():
        for values in head.parameters(recurse=False):
            values.copy_(values[order].clone())
