"""What computed: versions, machine, memory."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import version
from typing import Any

import psutil
import torch

PACKAGES = ("fedp2eft", "torch", "transformers", "peft", "flwr")
FILE = "machine.json"


def machine(device: torch.device) -> str:
    """The processor or GPU that the model runs on, and its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {torch.get_num_threads()} threads"


def peak_memory() -> int:
    """Return the most bytes of memory that this process has held so far."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def environment(device: torch.device) -> dict[str, Any]:
    """`versions` by package, `machine`, and `peak_memory` in bytes."""
    return {
        "peak_memory": peak_memory(),
        "versions": {name: version(name) for name in PACKAGES},
        "machine": machine(device),
    }
