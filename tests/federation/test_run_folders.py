"""Whose folder it is, and that nobody else's is touched."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fedp2eft.errors import UserError
from fedp2eft.federation.server.checkpoints import Checkpoint
from fedp2eft.federation.server.run_folder import RunFolder
from fedp2eft.settings.experiment import (
    AdapterSettings,
    EvaluationSettings,
    FederationSettings,
    LocalSettings,
    Settings,
)

SETTINGS = Settings()


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def made(folder: Path, settings: Settings = SETTINGS) -> Path:
    RunFolder(folder, settings).close()
    return folder


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (replace(SETTINGS, seed=1), "seed is 42 there and 1 here"),
        (replace(SETTINGS, local=LocalSettings(lr=0.5)), "local.lr is 0.0001 there and 0.5 here"),
        (replace(SETTINGS, adapter=AdapterSettings(r_max=16)), "adapter.r_max is 32 there"),
        (
            replace(SETTINGS, evaluation=EvaluationSettings(layout="compact")),
            "evaluation.layout is 'portable' there",
        ),
        (
            replace(SETTINGS, federation=FederationSettings(profile="reference")),
            "federation.profile is 'paper' there",
        ),
    ],
)
def test_another_experiment_names_the_setting_and_changes_nothing(tmp_path, other, named) -> None:
    folder = made(tmp_path / "run")
    before = snapshot(folder)
    with pytest.raises(UserError) as caught:
        RunFolder(folder, other)
    assert named in str(caught.value)
    assert "another experiment" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert snapshot(folder) == before
    made(folder)  # and nobody keeps it locked


def test_what_only_adds_to_a_run_may_change(tmp_path) -> None:
    folder = made(tmp_path / "run")
    more = replace(
        SETTINGS,
        federation=FederationSettings(rounds=200, timeout=5, keep_checkpoints=4),
        evaluation=EvaluationSettings(methods=["lora"], ranks=[1], pools=["seen"]),
    )
    made(folder, more)
    assert "rounds: 200" in (folder / "settings.yaml").read_text()


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not empty and holds no run"):
        RunFolder(tmp_path, SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_file_in_place_of_the_folder(tmp_path) -> None:
    file = tmp_path / "run"
    file.write_text("mine")
    with pytest.raises(UserError, match="is a file"):
        RunFolder(file, SETTINGS)
    with pytest.raises(UserError, match="Cannot use"):
        RunFolder(file / "below", SETTINGS)
    assert file.read_text() == "mine"


@pytest.mark.parametrize("text", ["", "[1, 2]", "{", "just words"])
def test_settings_that_are_no_runs(tmp_path, text) -> None:
    (tmp_path / "settings.yaml").write_text(text)
    with pytest.raises(UserError, match=r"settings.yaml is damaged, or not the settings of a run"):
        RunFolder(tmp_path, SETTINGS)
    assert (tmp_path / "settings.yaml").read_text() == text


def test_one_process_at_a_time(tmp_path) -> None:
    first = RunFolder(tmp_path / "run", SETTINGS)
    with pytest.raises(UserError, match="Another process is working on"):
        RunFolder(tmp_path / "run", SETTINGS)
    first.close()
    made(tmp_path / "run")


def test_a_process_killed_while_it_made_the_folder_does_no_harm(tmp_path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".lock").touch()
    (folder / ".settings.yaml-abcdefgh").write_text("seed: 4")
    made(folder)
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "settings.yaml"]


def test_what_a_killed_process_was_writing_is_cleared_away(tmp_path) -> None:
    folder = made(tmp_path / "run")
    left = [
        folder / ".base-abcdefgh" / "new",
        folder / ".psg-abcdefgh" / "old",
        folder / "adapters" / "de-seen-00" / ".fedp2eft-r2-abcdefgh" / "new",
    ]
    for path in left:
        path.mkdir(parents=True)
        (path / "model.safetensors").write_bytes(b"half")
    (folder / "cells" / "lora-r2").mkdir(parents=True)
    (folder / "cells" / "lora-r2" / ".de-seen-00.json-abcdefgh").write_text("{")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / ".psg-000001.safetensors-abcdefgh").write_bytes(b"half")
    made(folder)
    assert sorted(snapshot(folder)) == ["settings.yaml"]


def test_half_a_line_of_timings_spoils_no_other(tmp_path) -> None:
    run = RunFolder(tmp_path / "run", SETTINGS)
    (run.path / "timings.jsonl").write_text('{"phase": "ps')
    run.finish_round(Checkpoint("psg", 1, {}), {"loss": 1.0}, 2.0)
    run.close()
    lines = (run.path / "timings.jsonl").read_text().splitlines()
    assert lines == ['{"phase": "ps', '{"phase": "psg", "round": 1, "seconds": 2.0}']
