"""The cells of a comparison: which there are, where they are kept, and who works on which.

A comparison folder:

settings.yaml                                       the resolved settings
bases/<base>-s<seed>/                               run folder of a base model's training
runs/<base>-s<seed>[-<variant>]/                    run folder of the methods' federations on it
cells/<base>/s<seed>/<pool>/<method>-r<rank>.json   one file per cell, written once; of a budget in
                                                    parameters <method>-p<rank>.json
locks/                                              what the processes at work hold
results.json, table.md, table.csv, table.tex, …     what the cells say
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from fedp2eft.files import read_json, take_lock
from fedp2eft.methods import METHODS, method_named
from fedp2eft.results.at_budget import AtBudget
from fedp2eft.settings.experiment import Settings
from fedp2eft.settings.reading import with_sections


@dataclass(frozen=True, order=True)
class SharedTraining:
    """One training that several cells share.

    Args:
        base: How the base is trained.
        seed: The comparison's seed.
        variant: Settings its PSG is trained under, e.g. "adapter.layerwise-True"; "" for none.
    """

    base: str
    seed: int
    variant: str = ""

    @property
    def base_name(self) -> str:
        """The base's folder under bases/."""
        return f"{self.base}-s{self.seed}"

    @property
    def name(self) -> str:
        """Its folder under runs/."""
        return self.base_name + (f"-{self.variant}" if self.variant else "")


@dataclass(frozen=True)
class Cell:
    """One number of the comparison.

    Args:
        training: What it starts from.
        pool: Whose clients are scored.
        at: The method, and at which budget.
    """

    training: SharedTraining
    pool: str
    at: AtBudget

    @property
    def name(self) -> str:
        """Its file under cells/, without the ending."""
        t = self.training
        return f"{t.base}/s{t.seed}/{self.pool}/{self.at}"

    def path(self, folder: Path) -> Path:
        """Return its file in a comparison folder."""
        return folder / "cells" / f"{self.name}.json"

    def done(self, folder: Path) -> bool:
        """Return whether it was computed."""
        return isinstance(read_json(self.path(folder)), dict)


def plan(settings: Settings) -> list[Cell]:
    """Return all cells, those of one training side by side.

    Raises:
        UserError: An unknown method or base.
    """
    evaluation = settings.evaluation
    trainings: dict[SharedTraining, list[str]] = {}
    for base in settings.compare.bases or [settings.base.kind]:
        for seed in settings.compare.seeds:
            for name in evaluation.methods:
                variant = variant_name(method_named(name).variant)
                trainings.setdefault(SharedTraining(base, seed, variant), []).append(name)
    return [
        Cell(training, pool, AtBudget(method, rank, evaluation.budget if rank else "ranks"))
        for training, methods in trainings.items()
        for pool in evaluation.pools
        for method in methods
        for rank in (evaluation.ranks if METHODS[method].ranked else [0])
    ]


def variant_name(variant: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a name for the settings that a method's federation is trained under."""
    return "-".join(
        f"{section}.{key}-{value}"
        for section, keys in variant.items()
        for key, value in keys.items()
    )


def settings_of(
    settings: Settings, training: SharedTraining, *, base_only: bool = False
) -> Settings:
    """Return the settings of one training: its base, seeds, variant and the methods it serves.

    Args:
        settings: The comparison.
        training: Which training.
        base_only: That of the base alone, the same for every variant on it.
    """
    settings = with_sections(settings)
    methods = [
        name
        for name in settings.evaluation.methods
        if variant_name(method_named(name).variant) == training.variant
    ]
    changes: dict[str, dict[str, Any]] = {
        part.name: {"seed": training.seed}
        for part in fields(settings)  # whichever have a seed, beside the experiment's own
        if hasattr(getattr(settings, part.name), "seed")
    }
    changes["base"] = {"kind": training.base}
    changes["evaluation"] = {"methods": [] if base_only else methods, "save_adapters": False}
    if not base_only:
        for section, keys in METHODS[methods[0]].variant.items():
            changes.setdefault(section, {}).update(keys)
    sections = {name: replace(getattr(settings, name), **keys) for name, keys in changes.items()}
    return replace(settings, seed=training.seed, **sections)


@contextmanager
def claim(folder: Path, name: str) -> Iterator[bool]:
    """Take the lock of a piece of work; gives False if another process has it.

    Whoever gets a claim must look once more whether the work is still to be done.
    """
    path = folder / "locks" / name.replace("/", "_")
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = take_lock(path)
    try:
        yield lock is not None
    finally:
        if lock is not None:
            lock.release()
