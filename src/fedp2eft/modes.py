"""A model, or any other object, in another mode for a while; and whether the mode matters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers.utils import logging


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Put the model in that mode; restore its own afterwards, also after an error."""
    before = model.training
    model.train(training)
    try:
        yield
    finally:
        model.train(before)


@contextmanager
def with_values(holder: Any, **values: Any) -> Iterator[None]:
    """Set attributes of an object; restore its own afterwards, also after an error."""
    before = {name: getattr(holder, name) for name in values}
    try:
        for name, value in values.items():
            setattr(holder, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(holder, name, value)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence progress bars and all below an error; restore both afterwards."""
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


def has_dropout(model: nn.Module) -> bool:
    """Return whether the model draws random numbers in training, by its modules or config."""
    if any(isinstance(module, DROPOUTS) and module.p > 0 for module in model.modules()):
        return True
    config: Any = getattr(model, "config", None) or {}
    return _drops(config.to_dict() if hasattr(config, "to_dict") else config)


def _drops(config: Mapping[Any, Any]) -> bool:
    """Whether a config, or one inside it, has a rate of dropout above 0."""
    return any(
        _drops(value) if isinstance(value, Mapping) else _is_rate(key, value)
        for key, value in config.items()
    )


def _is_rate(key: object, value: object) -> bool:
    return "drop" in str(key) and isinstance(value, int | float) and value > 0
