"""A run that is watched: every message with its reply, and how often what was called."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from fedp2eft.settings.experiment import Settings


@dataclass
class FinishedRun:
    """A whole tiny run: its folder, every message with its reply, and how often what was called."""

    folder: Path
    messages: list[tuple[Any, Any]] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)


def watched(settings: Settings, folder: Path) -> FinishedRun:
    """Run an experiment and keep every message."""
    from fedp2eft.experiment.train import train
    from fedp2eft.federation.local import LocalGrid
    from fedp2eft.runtime import workspace
    from fedp2eft.tasks.classification import Classification

    done = FinishedRun(folder)
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
        train(settings, done.folder)
    return done
