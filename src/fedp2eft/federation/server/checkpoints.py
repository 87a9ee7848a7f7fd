"""Checkpoints: the server's parameters after a finished round.

One safetensors file per round, written atomically, with a digest of its parameters in the header. A
damaged newest file is passed over with a warning and the one before it is used. No random state is
kept: every draw is seeded by phase, round and client (`fedp2eft.seeding`).
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
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
class Progress:
    """How far a phase has come.

    Args:
        phase: Its name.
        round: Last finished round; 0 before the first.
    """

    phase: str
    round: int


def save_checkpoint(
    folder: Path,
    progress: Progress,
    parameters: Mapping[str, Tensor],
    keep: int,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the checkpoint of a finished round, then remove all but the `keep` newest.

    Args:
        folder: Of the checkpoints.
        progress: The round.
        parameters: The trained parameters by name.
        keep: How many rounds are kept.
        state: What the server remembers beside them (moments, privacy spent), by name.

    Raises:
        UserError: The disk is full; older checkpoints are untouched.
    """
    both = {**parameters, **{STATE + name: value for name, value in (state or {}).items()}}
    tensors = {name: value.detach().cpu().contiguous() for name, value in both.items()}
    # One key: safetensors writes several in random order, and a file is the same bits each time
    header = {HEADER: json.dumps({"progress": asdict(progress), "sha256": _digest(tensors)})}
    path = folder / f"{progress.phase}-{progress.round:06d}.safetensors"
    write_whole(path, lambda scratch: save_file(tensors, scratch, metadata=header))
    for old in _newest_first(folder, progress.phase)[keep:]:
        old.unlink(missing_ok=True)


def load_checkpoint(folder: Path, phase: str) -> tuple[Progress, dict[str, Tensor]] | None:
    """The newest whole checkpoint of a phase, or None. A damaged one is named in a warning."""
    return next(_numbers(_newest_first(folder, phase)), None)


def load_state(folder: Path, phase: str) -> dict[str, Tensor]:
    """What the server remembered beside the parameters in the newest whole checkpoint."""
    _, tensors = next(_whole(_newest_first(folder, phase)), (None, {}))
    return {n.removeprefix(STATE): value for n, value in tensors.items() if n.startswith(STATE)}


def all_checkpoints(folder: Path, phase: str) -> Iterator[tuple[Progress, dict[str, Tensor]]]:
    """Every whole checkpoint of a phase, oldest first."""
    return _numbers(reversed(_newest_first(folder, phase)))


def _numbers(paths: Iterable[Path]) -> Iterator[tuple[Progress, dict[str, Tensor]]]:
    for progress, tensors in _whole(paths):
        yield progress, {n: value for n, value in tensors.items() if not n.startswith(STATE)}


def _whole(paths: Iterable[Path]) -> Iterator[tuple[Progress, dict[str, Tensor]]]:
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {})[HEADER])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if header["sha256"] != _digest(tensors):
                raise ValueError("its parameters are not those that were written")
            progress = Progress(**header["progress"])
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            logger.warning(
                "Checkpoint %s is damaged (%s); falling back to the one before.", path, error
            )
            continue
        yield progress, tensors


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
