"""The ServerApp: the same on every engine."""

from __future__ import annotations

import json
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedp2eft.errors import UserError
from fedp2eft.experiment.reading import settings_from, settings_of_run
from fedp2eft.federation.reporting import current
from fedp2eft.federation.run_folder import RunFolder
from fedp2eft.federation.server import serve
from fedp2eft.federation.workspace import shared_workspace
from fedp2eft.methods import method_named

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the experiment that the run config names, in the run folder that it names.

    Run config:
        config: YAML file of the experiment (or `settings`: the same as JSON).
        run: The run folder.
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
        serve(grid, run, shared_workspace(json.dumps(settings), str(folder)), current())
    finally:
        run.close()
