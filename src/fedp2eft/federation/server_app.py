"""The ServerApp: the same on every engine."""

from __future__ import annotations

import logging
from contextlib import ExitStack, closing
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedp2eft.errors import UserError
from fedp2eft.federation.client.state import shared_state
from fedp2eft.federation.hooks import end_with_parent
from fedp2eft.federation.local import LocalGrid
from fedp2eft.federation.server.faults import summary_line
from fedp2eft.federation.server.phases import serve
from fedp2eft.federation.server.run_folder import RunFolder
from fedp2eft.federation.server.tracking import Trackers
from fedp2eft.files import write_text
from fedp2eft.generator import PSG
from fedp2eft.methods import check_trained_for
from fedp2eft.progress import current
from fedp2eft.results.cards import base_card, psg_card
from fedp2eft.results.rows import collect
from fedp2eft.runtime.inputs import check_inputs
from fedp2eft.settings.reading import settings_of_run

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
    end_with_parent()
    config = context.run_config
    experiment = settings_of_run(config)
    if not config.get("run"):
        raise UserError("The run config names no run folder: add run='runs/NAME'.")
    folder = Path(str(config["run"]))
    for method in experiment.evaluation.methods:
        check_trained_for(method, experiment)
    again = (folder / "settings.yaml").exists()
    with ExitStack() as at_the_end:
        run = at_the_end.enter_context(closing(RunFolder(folder, experiment)))
        run.trackers = Trackers(experiment, folder)
        at_the_end.callback(run.trackers.finish)
        if not isinstance(grid, LocalGrid):
            log_to_stderr()
            logger.info("Run folder: %s", folder.resolve())
        at_the_end.callback(report_faults, run)
        if again:
            run.faults.happened("started-again")
        workspace = shared_state(experiment, folder).workspace
        check_inputs(folder, workspace)
        serve(grid, run, workspace, current())
        results = collect(folder)
        psg = PSG.from_pretrained(run.psg)
        for made, card in (run.base, base_card), (run.psg, psg_card):
            write_text(made / "README.md", str(card(psg.config, results)))
        run.trackers.results(results)


def report_faults(run: RunFolder) -> None:
    """Report the number of faults of each kind, if any."""
    faults = run.faults.summarise()
    if faults["counts"]:
        current().note(summary_line(faults))


def log_to_stderr() -> None:
    """Show the progress of the run in Flower's log, which is what a ServerApp writes to stderr."""
    package = logging.getLogger("fedp2eft")
    if not package.handlers:
        package.addHandler(logging.StreamHandler())
        package.setLevel(logging.INFO)
