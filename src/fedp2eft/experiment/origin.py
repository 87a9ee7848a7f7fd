"""What computed: versions, machine, memory."""

from __future__ import annotations

import platform
import resource
from importlib.metadata import version
from typing import Any

import torch

PACKAGES = ("fedp2eft", "torch", "transformers", "peft", "flwr")
FILE = "machine.json"


def machine(device: torch.device) -> str:
    """The processor or GPU that the model runs on, and its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {torch.get_num_threads()} threads"


def facts(device: torch.device) -> dict[str, Any]:
    """`versions` by package, `machine`, and `peak_memory`: most bytes this process held so far."""
    return {
        "peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "versions": {name: version(name) for name in PACKAGES},
        "machine": machine(device),
    }
