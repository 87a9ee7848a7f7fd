"""An experiment on the local engine: what `fedp2eft train` does."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import torch
from flwr.app import Context, RecordDict

from fedp2eft.federation.client_app import app as client_app
from fedp2eft.federation.client_app import train_psg_ahead
from fedp2eft.federation.cohort import cohort_size
from fedp2eft.federation.local import SERVER_NODE_ID, Cohort, LocalGrid
from fedp2eft.federation.messages import TRAIN_PSG
from fedp2eft.federation.reporting import Reporter, report_to
from fedp2eft.federation.results import Results, collect
from fedp2eft.federation.server_app import app as server_app
from fedp2eft.federation.workspace import shared_workspace
from fedp2eft.reading import as_dict
from fedp2eft.settings import Settings


def train(settings: Settings, run: str | Path, reporter: Reporter | None = None) -> Results:
    """Train base and PSG, personalize and score every client, all in this process.

    A run folder that was stopped at any moment is gone on with; the result is the same, bit for
    bit, as that of an uninterrupted run on the same machine with the same number of threads.

    Args:
        settings: The experiment.
        run: The run folder.
        reporter: Hears of progress; log lines where none is given.

    Returns:
        The tables, also in results.json of the run folder.

    Raises:
        UserError: Bad settings or data, or a client that failed.
    """
    text = json.dumps(as_dict(settings))
    run = Path(run).resolve()
    config: dict[str, bool | float | int | str] = {"settings": text, "run": str(run)}
    # Federated runs must not depend on what the caller drew before.
    with torch.random.fork_rng():
        try:
            workspace = shared_workspace(text, str(run))
            grid = LocalGrid(
                client_app,
                [{"client": name} for name in sorted(workspace.clients)],
                config,
                Cohort(
                    TRAIN_PSG,
                    cohort_size(settings.federation.cohort, workspace.device),
                    train_psg_ahead,
                ),
            )
            context = Context(grid.run.run_id, SERVER_NODE_ID, {}, RecordDict(), config)
            with report_to(reporter) if reporter else nullcontext():
                server_app(grid, context)
        finally:
            # A run that goes on after a stop must begin from the folder, not from this memory.
            shared_workspace.cache_clear()
    return collect(run)
