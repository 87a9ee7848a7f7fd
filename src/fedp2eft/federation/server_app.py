"""The ServerApp: the same on every engine."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedp2eft.errors import UserError
from fedp2eft.federation.local import LocalGrid
from fedp2eft.federation.reporting import current
from fedp2eft.federation.results import collect
from fedp2eft.federation.run_folder import RunFolder
from fedp2eft.federation.server import serve
from fedp2eft.federation.workspace import shared_workspace
from fedp2eft.methods import method_named
from fedp2eft.reading import settings_from, settings_of_run

CONNECT_SECONDS, SETTLE_SECONDS = 60.0, 1.0

app = ServerApp()
logger = logging.getLogger(__name__)


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the experiment that the run config names, in the run folder that it names.

    Run config:
        config: YAML file of the experiment, in the Flower app or absolute (or `settings`: the same
            as JSON).
        run: The run folder, absolute or relative to the working directory of this process.
    """
    config = context.run_config
    settings = settings_of_run(config)
    if not config.get("run"):
        raise UserError("The run config names no run folder: add run='runs/NAME'.")
    folder = Path(str(config["run"]))
    experiment = settings_from(settings)
    for method in experiment.evaluation.methods:
        method_named(method)
    run = RunFolder(folder, experiment)
    try:
        if not isinstance(grid, LocalGrid):
            log_to_stderr()
            logger.info("Run folder: %s", folder.resolve())
            wait_for_nodes(grid)
        serve(grid, run, shared_workspace(json.dumps(settings), str(folder)), current())
        collect(folder)
    finally:
        run.close()


def log_to_stderr() -> None:
    """Show the progress of the run in Flower's log, which is what a ServerApp writes to stderr."""
    package = logging.getLogger("fedp2eft")
    if not package.handlers:
        package.addHandler(logging.StreamHandler())
        package.setLevel(logging.INFO)


def wait_for_nodes(grid: Grid) -> None:
    """Wait until nodes are connected and no more come: Flower may start the server before them.

    Raises:
        UserError: None came.
    """
    end = time.monotonic() + CONNECT_SECONDS
    known: set[int] = set()
    while not known or known != set(grid.get_node_ids()):
        if not known and time.monotonic() > end:
            raise UserError(f"No SuperNode is connected after {CONNECT_SECONDS:.0f} s: start one.")
        known = set(grid.get_node_ids())
        time.sleep(SETTLE_SECONDS)
