"""What travels: φ (or base weights), the number of examples and scalar metrics.

Everything that arrives is checked before use: names, shapes, dtypes and that numbers are finite.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import sha256

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from torch import Tensor

from fedp2eft.errors import UserError

ARRAYS, CONFIG, METRICS, ABOUT = "arrays", "config", "metrics", "about"
PREPARED = "prepared"
EXAMPLES = "num-examples"

# Flower's message types: category, dot, action.
DESCRIBE = "query.describe"
TRAIN_BASE = "train.base"
TRAIN_PSG = "train.psg"
SURVEY = "query.survey"
PERSONALIZE = "evaluate.personalize"


def to_arrays(numbers: Mapping[str, Tensor]) -> ArrayRecord:
    """Tensors by name as a Flower record (float32, on the CPU)."""
    return ArrayRecord(
        {name: Array(value.detach().cpu().float().numpy()) for name, value in numbers.items()}
    )


def from_arrays(record: ArrayRecord, like: Mapping[str, Tensor], whose: str) -> dict[str, Tensor]:
    """Tensors by name from a record that came over the wire.

    Args:
        record: What arrived.
        like: Tensors whose names and shapes it must have.
        whose: Named in the error, e.g. "φ of client fr-seen-00 in round 3".

    Raises:
        UserError: Other names, shapes or dtypes, numbers that are not finite, or bytes that are
            no array.
    """
    if set(record) != set(like):
        odd = sorted(set(record) ^ set(like))
        raise UserError(f"{whose} has other parameters than expected (first: {odd[0]!r}).")
    numbers = {}
    for name, array in record.items():
        try:
            value = array.numpy()
        except Exception as error:  # whatever a hostile peer can make numpy raise
            raise UserError(f"{whose}: {name} is no readable array.") from error
        if value.dtype != np.float32 or value.shape != tuple(like[name].shape):
            raise UserError(
                f"{whose}: {name} is {value.dtype} {value.shape}, "
                f"expected float32 {tuple(like[name].shape)}."
            )
        if not np.isfinite(value).all():
            raise UserError(f"{whose}: {name} holds NaN or infinity.")
        numbers[name] = torch.from_numpy(value)
    return numbers


def alike_arrays(records: Sequence[ArrayRecord], whose: str) -> list[dict[str, Tensor]]:
    """Tensors of several records that must have the same names and shapes.

    Raises:
        UserError: As `from_arrays`, the first record deciding what is expected.
    """
    if not records:
        return []
    like = {name: torch.empty(tuple(array.shape)) for name, array in records[0].items()}
    return [from_arrays(record, like, whose) for record in records]


def the_arrays(message: Message, name: str = ARRAYS) -> ArrayRecord:
    """The array record of that name, empty where there is none.

    Aggregation strategies of Flower choose the name themselves, so a message with a single array
    record gives that one.
    """
    records = message.content.array_records
    if name in records:
        return records[name]
    return next(iter(records.values())) if name == ARRAYS and len(records) == 1 else ArrayRecord()


def the_config(message: Message) -> ConfigRecord:
    """The config record of a message, empty where it has none."""
    return message.content.config_records.get(CONFIG, ConfigRecord())


def scalars(message: Message) -> dict[str, int | float]:
    """The metrics of a reply.

    Raises:
        UserError: A metric is a list: only single numbers may leave a client.
    """
    metrics = {}
    for name, value in message.content.metric_records[METRICS].items():
        if isinstance(value, list):
            raise UserError(f"Metric {name!r} of a client is a list; only single numbers travel.")
        metrics[name] = value
    return metrics


def reply_with(message: Message, content: RecordDict) -> Message:
    """A reply to `message`."""
    return Message(content, reply_to=message)


def nbytes(record: ArrayRecord) -> int:
    """Bytes of the arrays of a record on the wire."""
    return sum(len(array.data) for array in record.values())


def array_digest(record: ArrayRecord) -> str:
    """16 hex digits that tell these arrays from any others."""
    digest = sha256()
    for name in sorted(record):
        digest.update(name.encode() + record[name].data)
    return digest.hexdigest()[:16]
