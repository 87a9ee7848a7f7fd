"""What the tests of whole runs on every base share."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from fedp2eft.settings.experiment import Settings

PRIVATE = ("feddpa-t", "dept-spec")
# Large steps, so that what a client has for itself can be seen in its scores.
QUICK = {
    "base__lora_rank": 2,
    "base__lora_alpha": 4.0,
    "base__lr": 3e-2,
    "federation__rounds": 2,
    "federation__clients_per_round": 4,  # each in both rounds: ξ is known in the second
    "evaluation__ranks": [1],
    "evaluation__methods": ["base", "lora", "fedp2eft"],
}
WORDS = "bert.embeddings.word_embeddings.weight"


@dataclass
class Run:
    """A finished run, its messages and the base weights with which each client's work was done."""

    settings: Settings
    folder: Path
    messages: list[tuple[Any, Any]] = field(default_factory=list)
    present: list[tuple[str, str, dict[str, torch.Tensor]]] = field(default_factory=list)


def parts(run: Run) -> dict[str, dict[str, torch.Tensor]]:
    """The newest part of each client that has one."""
    found = {}
    for folder in sorted((run.folder / "clients").glob("*")):
        found[folder.name] = load_file(max(folder.glob("base-*.safetensors")))
    return found
