"""`fedp2eft train`, `fedp2eft compare` and `fedp2eft quickstart`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedp2eft.errors import InterruptedRunError
from fedp2eft.settings.reading import read_settings

if TYPE_CHECKING:
    from fedp2eft.progress import Reporter
    from fedp2eft.settings.experiment import Settings


def train_run(
    config: str, run: str | None = None, options: list[str] | None = None, watch: bool = False
) -> None:
    """Train base model and PSG, then personalize and score every client.

    To resume an interrupted run, start the same command again.

    Args:
        config: The experiment's YAML file.
        run: The run folder. Default: runs/NAME, with the file's name.
        options: Settings that override the file's.
        watch: Keep report.html of the folder up to date during the run.
    """
    _run(read_settings(config, options), _folder(run, config), watch)


def compare_methods(
    config: str, run: str | None = None, options: list[str] | None = None, watch: bool = False
) -> None:
    """Compute a table of methods, base models, ranks, seeds and pools.

    Each cell is computed once and kept. To resume, start the same command again; to share the work,
    start it in several terminals.

    Args:
        config: The comparison's YAML file.
        run: The comparison folder. Default: runs/NAME, with the file's name.
        options: Settings that override the file's.
        watch: Keep report.html of the folder up to date during the run.
    """
    settings, folder = read_settings(config, options), _folder(run, config)

    from fedp2eft.experiment.compare import compare as compute
    from fedp2eft.results.tables import write_tables

    with _at_work(folder, watch, "cells") as reporter:
        compute(settings, folder, reporter)
    write_tables(folder)
    print((folder / "table.md").read_text(encoding="utf-8"))
    print(f"Comparison folder: {folder}")


def quickstart(
    run: str = "runs/quickstart", options: list[str] | None = None, watch: bool = False
) -> None:
    """Run the whole pipeline on real text in a few minutes.

    It uses Debian package descriptions in German, Japanese and Russian, multilingual-e5-small, and
    seen and unseen clients. At the start it prints how long it will take on this machine.

    Args:
        run: The run folder.
        options: Settings that override the preset's.
        watch: Keep report.html of the folder up to date during the run.
    """
    preset = files("fedp2eft") / "presets" / "quickstart.yaml"
    settings, folder = read_settings(str(preset), options), Path(run).expanduser()
    if settings.model.task == "classification" and not folder.exists():
        _say_time(settings)
    _run(settings, folder, watch)


def _say_time(settings: Settings) -> None:
    """Print how long the run will take here, after a probe of a few seconds."""
    from fedp2eft.commands.probe import seconds_needed
    from fedp2eft.experiment.engine import machine
    from fedp2eft.models.precision import choose_device, resolve_precision

    device = choose_device(settings.model.device)
    dtype = str(resolve_precision(settings.model.precision, device)).removeprefix("torch.")
    seconds = seconds_needed(settings)
    shown = f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
    where = f"{machine(device)}, {dtype}"
    print(f"About {shown} on this machine as it is now ({where}).", flush=True)


def _folder(run: str | None, config: str) -> Path:
    return Path(run).expanduser() if run else Path("runs") / Path(config).stem


def _run(settings: Any, folder: Path, watch: bool) -> None:
    from fedp2eft.commands.terminal import show_gains, show_loading, show_results
    from fedp2eft.experiment.train import train as train_all

    start = time.perf_counter()
    with _at_work(folder, watch, "rounds") as reporter:
        results = train_all(settings, folder, reporter)
    show_gains(results)
    show_results(results)
    minutes, seconds = divmod(round(time.perf_counter() - start), 60)
    print(f"\nRun folder: {folder}  ({minutes} min {seconds:02d} s in this process)")
    if adapter := _shown(folder / "adapters"):
        show_loading(f"{folder}/base", str(adapter), settings.model.task)


def _shown(adapters: Path) -> Path | None:
    """Return the adapter to show: FedP²EFT's before the label prior's, unseen clients' first."""
    found = [path.parent for path in sorted(adapters.glob("*/*/adapter_config.json"))]

    def first(path: Path) -> tuple[bool, bool]:
        return path.name.startswith("fedp2eft-"), "-unseen-" in path.parent.name

    return max(reversed(found), key=first, default=None)


@contextmanager
def _at_work(folder: Path, watch: bool, what: str) -> Iterator[Reporter]:
    """Show the progress of a command that keeps finished rounds or cells in a folder."""
    from fedp2eft.commands.terminal import progress

    try:
        with ExitStack() as stack:
            reporter = stack.enter_context(progress())
            if watch:
                from fedp2eft.commands.report import extra_needed

                with extra_needed():
                    from fedp2eft.report.watch import watched
                print(f"Live report: {folder / 'report.html'}")
                reporter = stack.enter_context(watched(reporter, folder))
            yield reporter
    except KeyboardInterrupt:
        raise InterruptedRunError(
            f"Interrupted. Finished {what} are kept in {folder}: start the same command again to "
            "resume."
        ) from None
