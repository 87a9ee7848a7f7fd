"""An experiment on the local engine: what `fedp2eft train` does."""

from __future__ import annotations

from pathlib import Path

from fedp2eft.experiment.engine import environment, local_engine
from fedp2eft.experiment.lambdas import keep_lambdas_of
from fedp2eft.federation.server_app import app as server_app
from fedp2eft.files import write_json
from fedp2eft.progress import Reporter
from fedp2eft.results.cells import MACHINE_FILE
from fedp2eft.results.rows import Results, read_results
from fedp2eft.settings.experiment import Settings


def train(settings: Settings, run: str | Path, reporter: Reporter | None = None) -> Results:
    """Train base and PSG, personalize and score every client, all in this process.

    An interrupted run folder is resumed; the result is the same, bit for
    bit, as that of an uninterrupted run on the same machine with the same number of threads.

    Args:
        settings: The experiment.
        run: The run folder.
        reporter: Receives progress. Default: log lines.

    Returns:
        The tables, also in results.json of the run folder.

    Raises:
        UserError: Bad settings or data, or a client that failed.
    """
    run = Path(run).expanduser().resolve()
    with local_engine(settings, run, reporter) as engine:
        server_app(engine.grid, engine.context)
        keep_lambdas_of(settings, run, engine.workspace)
        write_json(run / MACHINE_FILE, environment(engine.workspace.device))
    return read_results(run)
