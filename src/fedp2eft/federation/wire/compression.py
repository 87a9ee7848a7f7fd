"""φ in fewer bytes: `wire: fp32 | bf16 | int8`.

With `fp32` a client sends its φ. Otherwise it sends by how much φ changed, rounded, and keeps what
the rounding lost for its next round (error feedback, Seide et al. 2014): over the rounds nothing is
lost. The server adds the mean change to its own fp32 φ. Downwards φ itself travels, in bf16 for
both of the shorter wires: its rounding is not carried on, as every round starts from the server's.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor

from fedp2eft.errors import ShareableError, UserError
from fedp2eft.federation.wire.messages import check_names, from_arrays, read_array, to_arrays
from fedp2eft.runtime.client_files import ClientFiles
from fedp2eft.settings.experiment import Wire

logger = logging.getLogger(__name__)

SCALE = "#scale"  # no parameter name has a "#" in it
STEPS = 127
DOWN: dict[Wire, Wire] = {"fp32": "fp32", "bf16": "bf16", "int8": "bf16"}


def pack(parameters: Mapping[str, Tensor], wire: Wire) -> ArrayRecord:
    """Return tensors by name as a Flower record.

    Args:
        parameters: fp32 tensors.
        wire: "fp32" as they are; "bf16" rounded to nearest even, as 16-bit patterns; "int8" in
            steps of a 127th of the largest number of each row, with one fp32 scale per row.
    """
    if wire == "fp32":
        return to_arrays(parameters)
    arrays = {}
    for name, value in parameters.items():
        value = value.detach().cpu().float()
        if wire == "bf16":
            arrays[name] = Array(value.bfloat16().view(torch.uint16).numpy())
            continue
        scale = _rows(value).abs().amax(dim=1, keepdim=True) / STEPS
        steps = torch.where(scale > 0, _rows(value) / scale, 0.0).round().clamp(-STEPS, STEPS)
        arrays[name] = Array(steps.to(torch.int8).reshape(value.shape).numpy())
        arrays[name + SCALE] = Array(scale.numpy())
    return ArrayRecord(arrays)


def unpack(
    record: ArrayRecord, like: Mapping[str, Tensor], wire: Wire, whose: str
) -> dict[str, Tensor]:
    """Return tensors by name (fp32) from a record that came over the wire.

    Args:
        record: What arrived.
        like: Tensors whose names and shapes it must have.
        wire: How it was packed.
        whose: Named in the error.

    Raises:
        UserError: Other names, shapes or dtypes, values that are not finite, or bytes that are
            no array.
    """
    if wire == "fp32":
        return from_arrays(record, like, whose)
    expected = {name: tuple(value.shape) for name, value in like.items()}
    if wire == "int8":
        expected |= {name + SCALE: (len(_rows(value)), 1) for name, value in like.items()}
    check_names(record, expected, whose)
    half = np.uint16 if wire == "bf16" else np.int8
    parameters = {}
    for name, value in like.items():
        packed = read_array(record[name], half, expected[name], f"{whose}: {name}")
        if wire == "bf16":
            number = torch.from_numpy(packed.copy()).view(torch.bfloat16).float()
        else:
            scale = read_array(record[name + SCALE], np.float32, expected[name + SCALE], whose)
            rows = _rows(torch.from_numpy(packed.astype(np.float32)))
            number = (rows * torch.from_numpy(scale.copy())).reshape(value.shape)
        if not bool(torch.isfinite(number).all()):
            raise ShareableError(f"{whose}: {name} holds NaN or infinity.")
        parameters[name] = number
    return parameters


class Feedback:
    """What rounding has kept back of each client's changes, by round.

    Args:
        folder: Where it is kept (`ClientFiles`), so that a resumed run sends the same bits.
        keep: Rounds that the server may go back by.
    """

    def __init__(self, folder: Path | None, keep: int = 2) -> None:
        self._files = ClientFiles(folder, "kept-back", keep)

    def send(
        self, client: str, round_: int, change: Mapping[str, Tensor], wire: Wire
    ) -> ArrayRecord:
        """Pack a client's change of φ with what was kept back before; keep what is lost now."""
        kept = self._before(client, round_)
        whole = {
            name: value + kept[name] if name in kept else value for name, value in change.items()
        }
        record = pack(whole, wire)
        sent = unpack(record, whole, wire, f"The change of {client}")
        self._files.write(client, round_, {name: whole[name] - sent[name] for name in whole})
        return record

    def _before(self, client: str, round_: int) -> dict[str, Tensor]:
        try:
            return self._files.before(client, round_) or {}
        except UserError as error:
            logger.warning("%s Left out.", error)
            return {}


def _rows(value: Tensor) -> Tensor:
    """Return a matrix as it is, anything else as one row."""
    return value if value.dim() == 2 else value.reshape(1, -1)
