"""Trackers: TensorBoard's own files read back; the others through stand-ins for their packages."""

from __future__ import annotations

import json
import posixpath
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedp2eft.errors import UserError
from fedp2eft.experiment.train import train
from fedp2eft.federation.server import tracking
from fedp2eft.federation.server.tracking import Trackers
from fedp2eft.progress import LogReporter, report_to
from fedp2eft.results.rows import Results, Row
from tiny_run import World

ROW = Row("lora", 2, "seen", {"de": 0.5, "fr": 0.75}, 0.625, 0.5, 0.25, None, 2, 10.0)


def small(world: World, rows: Path, **changes: Any) -> Any:
    return world.settings(
        data__path=str(rows), base__rounds=1, federation__rounds=2, evaluation__ranks=[2],
        evaluation__methods=["base", "fedp2eft"], **changes,
    )  # fmt: skip


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every scalar that TensorBoard finds: tag → (step, value)."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_tensorboard_shows_rounds_and_results(world: World, three_clients: Path, tmp_path: Path):
    run = tmp_path / "run"
    results = train(small(world, three_clients, trackers=["tensorboard"]), run)
    found = scalars(run / "tensorboard")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    psg = [(line["round"], line["psg-loss"]) for line in lines if line["phase"] == "psg"]
    assert len(psg) == 2
    assert found["psg/psg-loss"] == [(step, pytest.approx(value)) for step, value in psg]
    assert len(found["base/loss"]) == 1
    assert "psg/seconds" in found
    for row in results.rows:
        where = f"results/{row.pool}/{row.method}-r{row.rank}"
        assert found[f"{where}/mean"][0][1] == pytest.approx(row.mean)
        assert found[f"{where}/de"][0][1] == pytest.approx(row.languages["de"])
    # A stopped run goes on with other trackers, and without.
    assert train(small(world, three_clients), run).rows == results.rows


def test_an_absent_package_is_said_before_anything_is_computed(
    world: World, three_clients: Path, tmp_path: Path, monkeypatch
):
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="mlflow, which is not installed: pip install mlflow"):
        train(small(world, three_clients, trackers=["mlflow"]), tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert not (tmp_path / "run" / "base").exists()


def test_an_unknown_tracker(world: World):
    with pytest.raises(UserError, match="trackers"):
        world.settings(trackers=["tensorbord"])


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A stand-in for wandb; what it was told."""
    told: dict[str, Any] = {"logged": [], "config": {}, "finished": 0}

    def finish() -> None:
        told["finished"] += 1

    def init(**options: Any) -> SimpleNamespace:
        told["init"] = options
        log = lambda values, step=None: told["logged"].append((values, step))  # noqa: E731
        return SimpleNamespace(log=log, finish=finish)

    config = SimpleNamespace(update=lambda values, **_: told["config"].update(values))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, config=config))
    monkeypatch.setattr(tracking, "find_spec", lambda name: name)
    return told


def test_wandb_counts_by_itself_and_hears_of_no_client(world: World, tmp_path: Path, wandb):
    files = {"de-seen-00": {"path": "/secret/place.jsonl"}}
    settings = world.settings(trackers=["wandb"], data__path=None, data__files=files)
    trackers = Trackers(settings, tmp_path / "my-run")
    trackers.round("base", 6, {"loss": 1.5, "left-out": {"de-seen-00": "refused"}}, 2.0)
    trackers.round("psg", 1, {"psg-loss": 0.5}, 1.0)
    trackers.results(Results(tmp_path, (ROW,)))
    trackers.finish()
    assert wandb["init"]["project"] == "fedp2eft"
    assert wandb["init"]["name"] == "my-run"
    assert wandb["logged"][:2] == [
        ({"base/loss": 1.5, "base/seconds": 2.0, "base/round": 6}, None),
        ({"psg/psg-loss": 0.5, "psg/seconds": 1.0, "psg/round": 1}, None),
    ]
    assert wandb["logged"][2][0]["results/seen/lora-r2/fr"] == 0.75
    assert wandb["finished"] == 1
    assert wandb["config"]["local.lr"] == settings.local.lr
    assert "secret" not in str(wandb)
    assert "de-seen-00" not in str(wandb)


def test_a_tracker_that_fails_is_left_out(world: World, tmp_path: Path, wandb):
    trackers = Trackers(world.settings(trackers=["wandb"]), tmp_path / "run")
    notes: list[str] = []

    class Notes(LogReporter):
        def note(self, text: str) -> None:
            notes.append(text)

    def gone(*_: object, **__: object) -> None:
        raise ConnectionError("the server went away")

    with report_to(Notes()):
        trackers._started["wandb"].run.log = gone
        trackers.round("psg", 1, {"psg-loss": 0.5}, 1.0)
        trackers.round("psg", 2, {"psg-loss": 0.5}, 1.0)
        trackers.finish()
    assert len(notes) == 1
    assert "wandb failed and is left out" in notes[0]


def test_mlflow_gets_names_that_it_takes(world: World, tmp_path: Path, monkeypatch):
    """It takes none of a call's metrics if one name has another character, or is no plain path."""
    logged: dict[str, float] = {}
    package = SimpleNamespace(
        active_run=lambda: None,
        start_run=lambda **_: None,
        end_run=lambda: None,
        set_experiment=lambda **_: SimpleNamespace(experiment_id=1),
        create_experiment=lambda **_: 1,
        search_experiments=lambda **_: [],
        log_param=lambda *_: None,
        log_params=lambda *_: None,
        log_metrics=lambda values, step=None: logged.update(values),
        utils=SimpleNamespace(
            validation=SimpleNamespace(MAX_PARAM_VAL_LENGTH=6000, MAX_PARAMS_TAGS_PER_BATCH=100)
        ),
    )
    monkeypatch.setitem(sys.modules, "mlflow", package)
    monkeypatch.setattr(tracking, "find_spec", lambda name: name)
    trackers = Trackers(world.settings(trackers=["mlflow"]), tmp_path / "run")
    languages = {"zh [/x]": 0.1, "zh {/x}": 0.2, "..": 0.3, "français": 0.4, "a//b": 0.5}
    trackers.results(
        Results(tmp_path, (Row("lora", 2, "seen", languages, 0.3, 0.1, 0.2, None, 2, 10.0),))
    )
    trackers.finish()
    assert len(logged) == 2 + len(languages)
    assert logged["results/seen/lora-r2/français"] == 0.4
    assert all(re.fullmatch(r"[/\w.\- ]+", name) for name in logged)
    assert all(posixpath.normpath(name) == name for name in logged)


def test_one_that_cannot_start_is_a_line(world: World, tmp_path: Path, wandb, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace())
    with pytest.raises(UserError, match="The tracker wandb cannot be started"):
        Trackers(world.settings(trackers=["wandb"]), tmp_path / "run")


def test_accelerate_stays_out_until_it_is_asked_for():
    code = (
        "import sys; from fedp2eft.federation.server import tracking; "
        "print('accelerate.tracking' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
