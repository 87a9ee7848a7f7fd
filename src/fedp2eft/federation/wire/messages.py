"""What travels: φ (or base weights), the number of examples and scalar metrics.

Everything that arrives is checked before use: names, shapes, dtypes and that values are finite.
Arrays are NumPy's own format, read without pickle. Secure sums import this module in processes
that need no torch, so torch is imported where tensors are made.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from io import BytesIO
from math import isfinite
from typing import TYPE_CHECKING, Any
from warnings import catch_warnings, filterwarnings

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from numpy.lib import format as npy
from numpy.typing import NDArray

from fedp2eft.errors import ShareableError, UserError, shortened

if TYPE_CHECKING:
    from torch import Tensor

ARRAYS, CONFIG, METRICS, ABOUT = "arrays", "config", "metrics", "about"
CHOICE = "choice"
PREPARED = "prepared"
EXAMPLES = "num-examples"
LABEL_PRIOR = "label-prior"
"""Where the config of a message has q (`fedp2eft.tasks.label_prior`)."""
MOST_HEADER = 4096  # of a NumPy file, which is 64 to 128 bytes for our arrays

# Flower's message types: category, dot, action. Those of training are `Phase.kind`.
DESCRIBE = "query.describe"
TAKE_BASE = "query.base"
SURVEY = "query.survey"
LABELS = "query.labels"
PERSONALIZE = "evaluate.personalize"


def to_arrays(parameters: Mapping[str, Tensor]) -> ArrayRecord:
    """Return tensors by name as a Flower record (float32, on the CPU)."""
    return ArrayRecord(
        {name: Array(value.detach().cpu().float().numpy()) for name, value in parameters.items()}
    )


def from_arrays(record: ArrayRecord, like: Mapping[str, Tensor], whose: str) -> dict[str, Tensor]:
    """Return tensors by name from a record that came over the wire.

    They are the record's own bytes: read them, never write into them.

    Args:
        record: What arrived.
        like: Tensors whose names and shapes it must have.
        whose: Named in the error, e.g. "φ of client fr-seen-00 in round 3".

    Raises:
        UserError: Other names, shapes or dtypes, values that are not finite, or bytes that are
            no array.
    """
    import torch

    check_names(record, like, whose)
    parameters = {}
    with catch_warnings():
        filterwarnings("ignore", "The given NumPy array is not writable")
        for name, expected in like.items():
            value = read_array(record[name], np.float32, tuple(expected.shape), f"{whose}: {name}")
            if not np.isfinite(value).all():
                raise ShareableError(f"{whose}: {name} holds NaN or infinity.")
            parameters[name] = torch.from_numpy(value)
    return parameters


def check_names(record: ArrayRecord, expected: Iterable[str], whose: str) -> None:
    """Raise `UserError` unless the arrays have exactly these names."""
    odd = sorted(set(record) ^ set(expected))
    if odd:
        raise ShareableError(
            f"{whose} has other parameters than expected (first: {shortened(odd[0])})."
        )


def read_array(
    array: Array, dtype: type[np.generic], shape: tuple[int, ...], whose: str
) -> NDArray[Any]:
    """Return a foreign array, read-only; a `UserError` if its dtype or shape is another."""
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    if len(array.data) > size + MOST_HEADER:
        raise ShareableError(f"{whose} has more bytes than {np.dtype(dtype)} {shape} takes.")
    try:
        value = _in_place(array)
    except Exception as error:  # whatever a hostile peer can make numpy raise
        raise ShareableError(f"{whose} is not a readable array.") from error
    if value.dtype != dtype or value.shape != shape:
        raise ShareableError(
            f"{whose} is {shortened(str(value.dtype))[1:-1]} {value.shape}, "
            f"expected {np.dtype(dtype)} {shape}."
        )
    return value


def _in_place(array: Array) -> NDArray[Any]:
    """Return the values of an array where they are in its bytes.

    `Array.numpy` copies them, which for a base of 87 MB takes longer than all checks of it.
    """
    stream = BytesIO(array.data)
    if array.stype != "numpy.ndarray" or npy.read_magic(stream) != (1, 0):
        return Array.numpy(array)
    shape, fortran, dtype = npy.read_array_header_1_0(stream, MOST_HEADER)
    if dtype.hasobject:
        raise ValueError("objects")
    return np.ndarray(shape, dtype, array.data, stream.tell(), order="F" if fortran else "C")


class _ReadInPlace(Array):
    """One whose reader shares its bytes; Flower's strategies do not write into what they read."""

    def numpy(self) -> NDArray[Any]:
        return _in_place(self)


def read_in_place(record: ArrayRecord, names: Iterable[str]) -> ArrayRecord:
    """Return arrays of a checked record whose `numpy()` copies nothing."""
    shared = ArrayRecord()
    for name in names:  # one by one: a record makes arrays of its own out of a dictionary
        array = record[name]
        shared[name] = _ReadInPlace(array.dtype, array.shape, array.stype, array.data)
    return shared


def any_arrays(record: ArrayRecord, whose: str) -> dict[str, Tensor]:
    """Return tensors of a record of any names and shapes.

    Raises:
        UserError: As `from_arrays`.
    """
    import torch

    try:  # "meta": a shape from a peer takes no memory
        like = {n: torch.empty(tuple(a.shape), device="meta") for n, a in record.items()}
    except (RuntimeError, TypeError, ValueError) as error:
        raise ShareableError(f"{whose} has an array of no possible shape.") from error
    return from_arrays(record, like, whose)


def the_arrays(message: Message, name: str = ARRAYS) -> ArrayRecord:
    """Return the array record of that name, empty if absent.

    Aggregation strategies of Flower choose the name themselves, so a message with a single array
    record gives that one.
    """
    records = message.content.array_records
    if name in records:
        return records[name]
    return next(iter(records.values())) if name == ARRAYS and len(records) == 1 else ArrayRecord()


def the_config(message: Message) -> ConfigRecord:
    """Return the config record of a message, empty if absent."""
    return message.content.config_records.get(CONFIG, ConfigRecord())


def with_label_prior(config: ConfigRecord, label_prior: Sequence[float]) -> ConfigRecord:
    """Return the config with q in it, if there is one."""
    known = {LABEL_PRIOR: list(label_prior)} if label_prior else {}
    return ConfigRecord({**config, **known})


def scalars(message: Message) -> dict[str, int | float]:
    """Return the metrics of a reply.

    Raises:
        UserError: There are none, or one is a list (only single numbers may leave a client) or not
            finite.
    """
    metrics = {}
    for name, value in message.content.metric_records.get(METRICS, MetricRecord()).items():
        if isinstance(value, list):
            raise UserError(
                f"Metric {shortened(name)} of a client is a list; only single numbers are accepted."
            )
        if not isfinite(value):
            raise UserError(f"Metric {shortened(name)} of a client is {value}.")
        metrics[name] = value
    return metrics


def whole(metrics: Mapping[str, int | float], name: str, least: int = 0) -> int:
    """Return a metric that counts something.

    Raises:
        UserError: It is missing, no whole number, or below `least`.
    """
    value = metrics.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"its {name} is {value}, not a whole number of {least} or more")
    return value


def nbytes(record: ArrayRecord) -> int:
    """Return the bytes of the arrays of a record on the wire."""
    return sum(len(array.data) for array in record.values())


def content_bytes(content: RecordDict) -> int:
    """Return bytes of all that a message holds: arrays, metrics and configs, without names."""
    size = sum(nbytes(record) for record in content.array_records.values())
    others: list[Mapping[str, Any]] = [*content.config_records.values()]
    others += content.metric_records.values()
    for other in others:
        for value in other.values():
            values = value if isinstance(value, list) else [value]
            size += sum(len(v) if isinstance(v, bytes | str) else 8 for v in values)
    return size


def base_id(digest: str, model: str) -> str:
    """Return a name that identifies a finished base.

    Args:
        digest: `array_digest` of what travelled.
        model: `hash_weights` of the untrained model.
    """
    return f"{digest} on {model}"


def array_digest(record: ArrayRecord) -> str:
    """Return a digest of the arrays, 16 hex digits."""
    digest = sha256()
    for name in sorted(record):
        digest.update(name.encode() + record[name].data)
    return digest.hexdigest()[:16]
