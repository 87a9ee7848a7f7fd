"""Experiment trackers: the rounds and the final tables of a run, for TensorBoard and its like.

Only metrics that the run folder's metrics.jsonl and results.json hold go there, and the settings:
none of a single client by name, and no text. The trackers are accelerate's, imported only then.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fedp2eft.errors import UserError, shortened
from fedp2eft.progress import current
from fedp2eft.results.at_budget import AtBudget
from fedp2eft.results.rows import Results
from fedp2eft.settings.experiment import Settings

_INSTALL = {"tensorboard": "'fedp2eft[trackers]'", "wandb": "wandb", "mlflow": "mlflow"}
_PROJECT = "fedp2eft"


class Trackers:
    """The trackers of one run, started; none where the settings name none.

    A tracker that fails later, a server that went away say, is left out from there on and does not
    stop the run.

    Args:
        settings: The experiment; its `trackers` are started.
        run: The run folder; TensorBoard writes into its folder tensorboard/.

    Raises:
        UserError: The package of one is absent, or it cannot be started.
    """

    def __init__(self, settings: Settings, run: Path) -> None:
        self._started: dict[str, Any] = {}
        for name in settings.trackers:
            if find_spec(name) is None:
                raise UserError(
                    f"trackers names {name}, which is not installed: pip install {_INSTALL[name]}, "
                    "or leave it out."
                )
        for name in dict.fromkeys(settings.trackers):
            try:
                tracker = _make(name, run)
                tracker.start()
                tracker.store_init_configuration(_flat(asdict(settings)))
            except Exception as error:  # each library raises its own
                self.finish()
                raise UserError(
                    f"The tracker {name} cannot be started ({shortened(str(error))}): fix it, or "
                    "leave it out of trackers."
                ) from error
            self._started[name] = tracker

    def round(self, phase: str, round_: int, metrics: Mapping[str, Any], seconds: float) -> None:
        """Log the metrics of a finished round, under `phase/name`, at step `round_`."""
        logged = {f"{phase}/{k}": v for k, v in metrics.items() if isinstance(v, int | float)}
        logged |= {f"{phase}/seconds": seconds, f"{phase}/round": round_}

        def send(name: str, tracker: Any) -> None:
            # wandb has one counter for all phases, which may not go back: it counts by itself.
            tracker.log(_named(name, logged), step=None if name == "wandb" else round_)

        self._each(send)

    def results(self, results: Results) -> None:
        """Send the final tables, under `results/pool/method-rN/…`."""
        logged: dict[str, float] = {}
        for row in results.rows:
            where = f"results/{row.pool}/{AtBudget(row.method, row.rank)}"
            logged[f"{where}/mean"] = row.mean
            logged[f"{where}/worst-language"] = row.worst_language
            logged |= {f"{where}/{language}": v for language, v in row.languages.items()}
        self._each(lambda name, tracker: tracker.log(_named(name, logged)))

    def finish(self) -> None:
        """Close all of them."""
        self._each(lambda _, tracker: tracker.finish())
        self._started.clear()

    def _each(self, do: Callable[[str, Any], None]) -> None:
        for name, tracker in list(self._started.items()):
            try:
                do(name, tracker)
            except Exception as error:
                del self._started[name]
                why = shortened(str(error) or type(error).__name__)
                current().note(f"The tracker {name} failed and is left out from here on: {why}.")


def _make(name: str, run: Path) -> Any:
    from accelerate import tracking

    if name == "tensorboard":
        return tracking.TensorBoardTracker("tensorboard", logging_dir=run)
    if name == "wandb":
        return tracking.WandBTracker(_PROJECT, name=run.name, dir=str(run))
    return tracking.MLflowTracker(_PROJECT, run_name=run.name)


def _named(tracker: str, logged: Mapping[str, float]) -> dict[str, float]:
    """Return metrics by names that a tracker takes; a language may be called anything.

    MLflow refuses all metrics of a call if one name holds more than letters, digits and `_-. /`,
    or if it is no plain path.
    """
    if tracker != "mlflow":
        return dict(logged)
    named: dict[str, float] = {}
    for name, value in logged.items():
        parts = [re.sub(r"[^\w.\- ]", "_", part) for part in name.split("/")]
        plain = "/".join(part if part.strip(".") else "_" for part in parts)[:200]
        again = itertools.count(2)
        while plain in named:  # two languages that differ in odd characters alone
            plain = f"{plain} {next(again)}"
        named[plain] = value
    return named


def _flat(settings: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Return settings as `section.name` → a plain value; no client's name or file."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{where}{key}"
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{name}.")
        elif name not in ("data.path", "trackers"):
            flat[name] = value if isinstance(value, bool | int | float | str) else str(value)
    return {key: value for key, value in flat.items() if not key.startswith("data.files.")}
