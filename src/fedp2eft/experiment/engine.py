"""The local engine for an experiment: one process, one base model for all clients."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
from flwr.app import Context, RecordDict

from fedp2eft.errors import require
from fedp2eft.federation.client.state import release_state, shared_state
from fedp2eft.federation.client_app import app as client_app
from fedp2eft.federation.client_app import serve_phases, train_psg_ahead
from fedp2eft.federation.hooks import SERVER_NODE_ID
from fedp2eft.federation.local import LocalGrid, ManyAtOnce
from fedp2eft.progress import Reporter, report_to
from fedp2eft.runtime.phases import PSG_PHASE
from fedp2eft.runtime.workspace import Workspace
from fedp2eft.settings.experiment import Settings
from fedp2eft.settings.reading import settings_of_run, settings_text


@dataclass(frozen=True)
class LocalEngine:
    """What the ServerApp needs to run in this process.

    Args:
        grid: Serves every client of the experiment.
        workspace: The clients' and the server's, which share one base model.
        context: For a ServerApp.
    """

    grid: LocalGrid
    workspace: Workspace
    context: Context


@contextmanager
def local_engine(
    settings: Settings, run: Path, reporter: Reporter | None = None
) -> Iterator[LocalEngine]:
    """The engine for one experiment and run folder; its memory is let go at the end.

    The global random state is as it was afterwards: federated runs must not depend on what the
    caller drew before.

    Args:
        settings: The experiment.
        run: The run folder.
        reporter: Receives progress. Default: the current one.
    """
    run = run.resolve()
    config: dict[str, bool | float | int | str] = {
        "settings": settings_text(settings),
        "run": str(run),
    }
    settings = settings_of_run(config)  # with the sections of all methods
    with torch.random.fork_rng(), report_to(reporter) if reporter else nullcontext():
        try:
            workspace = shared_state(settings, run).workspace
            require(
                bool(workspace.clients),
                "data.dataset is nodes, whose rows are on the SuperNodes: start it with flwr run "
                "(docs/deployment.md).",
            )
            serve_phases()  # of methods that were registered since
            grid = LocalGrid(
                client_app,
                [{"client": name} for name in sorted(workspace.clients)],
                config,
                ManyAtOnce(PSG_PHASE.kind, settings.federation.cohort_size, train_psg_ahead),
            )
            context = Context(grid.run.run_id, SERVER_NODE_ID, {}, RecordDict(), config)
            yield LocalEngine(grid, workspace, context)
        finally:
            # A resumed run must start from the folder, not from this memory.
            release_state()


PACKAGES = ("fedp2eft", "torch", "transformers", "peft", "flwr")


def machine(device: torch.device) -> str:
    """Return the processor or GPU that the model runs on, and its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{platform.machine()}, {threads} thread{'s' if threads > 1 else ''}"


def peak_memory() -> int:
    """Return the most bytes of memory that this process has held so far."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def environment(device: torch.device) -> dict[str, Any]:
    """Return `versions` by package, `machine`, and `peak_memory` in bytes."""
    return {
        "peak_memory": peak_memory(),
        "versions": {name: version(name) for name in PACKAGES},
        "machine": machine(device),
    }
