"""The project's rounds, roster, waiting and faults around such clients."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedp2eft.federation.hooks import end_with_parent
from fedp2eft.federation.server.admission import Failures
from fedp2eft.federation.server.aggregation import Averaging
from fedp2eft.federation.server.exchange import roster
from fedp2eft.federation.server.presence import wait_for_nodes
from fedp2eft.federation.server.rounds import run_rounds
from fedp2eft.federation.server.run_folder import RunFolder
from fedp2eft.progress import current
from fedp2eft.runtime.phases import PSG_PHASE
from fedp2eft.settings.reading import read_settings

FIRST = {"w": torch.zeros(3)}
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    end_with_parent()
    logging.basicConfig(level=logging.INFO)
    s = read_settings(str(context.run_config["settings"]))
    folder = Path(str(context.run_config["run"]))
    again = (folder / "settings.yaml").exists()
    run = RunFolder(folder, s)
    try:
        if again:
            run.faults.happened("started-again")
        wait_for_nodes(grid, s.federation, current())
        failures = Failures.on(grid, s.peers, current(), run.faults)
        members = roster(grid, s.federation.timeout, failures)
        aggregator = Averaging(s, PSG_PHASE, members)
        run_rounds(grid, run, PSG_PHASE, aggregator, FIRST, current())
    finally:
        run.faults.summarise()
        run.close()
