"""Checkpoints: the server's parameters after a finished round.

One safetensors file per round, written atomically, with a digest of its parameters in the header. A
damaged newest file is passed over with a warning and the one before it is used. No random state is
kept: every draw is seeded by phase, round and client (`fedp2eft.seeding`).
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedp2eft.files import write_whole

logger = logging.getLogger(__name__)

HEADER = "checkpoint"
STATE = "#state/"  # no parameter's name has a "#" in it


@dataclass(frozen=True)
class Checkpoint:
    """A phase after a finished round.

    Args:
        phase: Its name.
        round: The round, from 1.
        parameters: The trained parameters by name.
        state: What the server remembers beside them (moments, privacy spent), by name.
    """

    phase: str
    round: int
    parameters: dict[str, Tensor]
    state: dict[str, Tensor] = field(default_factory=dict)


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> None:
    """Write the checkpoint of a finished round, then remove all but the `keep` newest.

    Raises:
        UserError: The disk is full; older checkpoints are untouched.
    """
    phase, round_ = checkpoint.phase, checkpoint.round
    both = checkpoint.parameters | {STATE + n: value for n, value in checkpoint.state.items()}
    tensors = {name: value.detach().cpu().contiguous() for name, value in both.items()}
    # One key: safetensors writes several in random order, and a file is the same bits each time
    progress = {"phase": phase, "round": round_}
    header = {HEADER: json.dumps({"progress": progress, "sha256": _digest(tensors)})}
    path = folder / _name(phase, round_)
    write_whole(path, lambda scratch: save_file(tensors, scratch, metadata=header))
    for old in _newest_first(folder, phase)[keep:]:
        old.unlink(missing_ok=True)


def load_checkpoint(folder: Path, phase: str) -> Checkpoint | None:
    """Return the newest whole checkpoint of a phase, or None; warn of a damaged one."""
    return next(_whole(_newest_first(folder, phase)), None)


def all_checkpoints(folder: Path, phase: str) -> Iterator[Checkpoint]:
    """Yield every whole checkpoint of a phase, oldest first."""
    return _whole(reversed(_newest_first(folder, phase)))


def _whole(paths: Iterable[Path]) -> Iterator[Checkpoint]:
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {})[HEADER])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if header["sha256"] != _digest(tensors):
                raise ValueError("its parameters are not those that were written")
            named = [name for name in tensors if name.startswith(STATE)]
            state = {name.removeprefix(STATE): tensors.pop(name) for name in named}
            found = Checkpoint(**header["progress"], parameters=tensors, state=state)
            # The digest does not cover the header: a flipped bit can make round 2 round 12.
            if path.name != _name(found.phase, found.round):
                raise ValueError(f"its header says round {found.round} of {found.phase}")
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            logger.warning(
                "Checkpoint %s is damaged (%s); falling back to the one before.", path, error
            )
            continue
        yield found


def _name(phase: str, round_: int) -> str:
    return f"{phase}-{round_:06d}.safetensors"


def _newest_first(folder: Path, phase: str) -> list[Path]:
    pattern = re.compile(rf"{re.escape(phase)}-\d+\.safetensors")
    found = [path for path in folder.glob(f"{phase}-*") if pattern.fullmatch(path.name)]
    return sorted(found, reverse=True)


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = sha256()
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
