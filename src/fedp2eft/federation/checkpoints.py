"""Checkpoints: the server's numbers after a finished round.

One safetensors file per round, put in place whole, with a digest of its numbers in the header. A
damaged newest file is passed over with a warning and the one before it is used. No random state is
kept: every draw is seeded by phase, round and client (`fedp2eft.seeding`).
"""

from __future__ import annotations

import json
import logging
import re
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


@dataclass(frozen=True)
class Progress:
    """How far a phase has come.

    Args:
        phase: "base" or "psg".
        round: Last finished round; 0 before the first.
        metrics_bytes: Length of metrics.jsonl when that round was finished.
    """

    phase: str
    round: int
    metrics_bytes: int


def save_checkpoint(
    folder: Path, progress: Progress, numbers: dict[str, Tensor], keep: int
) -> None:
    """Write the checkpoint of a finished round, then remove all but the `keep` newest.

    Raises:
        UserError: The disk is full; older checkpoints are untouched.
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in numbers.items()}
    # One key: safetensors writes several in random order, and a file is the same bits each time
    header = {HEADER: json.dumps({"progress": asdict(progress), "sha256": _digest(tensors)})}
    path = folder / f"{progress.phase}-{progress.round:06d}.safetensors"
    write_whole(path, lambda scratch: save_file(tensors, scratch, metadata=header))
    for old in _newest_first(folder, progress.phase)[keep:]:
        old.unlink(missing_ok=True)


def load_checkpoint(folder: Path, phase: str) -> tuple[Progress, dict[str, Tensor]] | None:
    """The newest whole checkpoint of a phase, or None. A damaged one is named in a warning."""
    for path in _newest_first(folder, phase):
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {})[HEADER])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if header["sha256"] != _digest(tensors):
                raise ValueError("its numbers are not those that were written")
            progress = Progress(**header["progress"])
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            logger.warning(
                "Checkpoint %s is damaged (%s); falling back to the one before.", path, error
            )
            continue
        return progress, tensors
    return None


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
