"""Shared by all tests: no hub, and one tiny run that many of them look at."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tiny_run import World

os.environ["HF_HUB_OFFLINE"] = "1"
# Tiny models gain nothing from threads, and on busy cores every step waits for all of them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")


@dataclass
class FinishedRun:
    """A whole tiny run: its folder, every message with its reply, and how often what was called."""

    folder: Path
    messages: list[tuple[Any, Any]] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """The tiny experiment; tests only read it."""
    from tiny_run import make_world

    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def finished(world: World, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """One uninterrupted run of the tiny experiment; tests only read it."""
    from fedp2eft.experiment.train import train
    from fedp2eft.federation import workspace
    from fedp2eft.federation.local import LocalGrid
    from fedp2eft.tasks.classification import Classification

    done = FinishedRun(tmp_path_factory.mktemp("finished") / "run")
    run_client, encode = LocalGrid._run_client, Classification.encode
    load_base, features = workspace.load_base, workspace.features

    def recording(grid: Any, message: Any) -> Any:
        reply = run_client(grid, message)
        done.messages.append((message, reply))
        return reply

    def counted(name: str, function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            done.calls[name] += 1
            return function(*args, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalGrid, "_run_client", recording)
        patch.setattr(Classification, "encode", counted("encode", encode))
        patch.setattr(workspace, "load_base", counted("load_base", load_base))
        patch.setattr(workspace, "features", counted("features", features))
        train(world.settings(), done.folder)
    return done
