"""A run that was stopped and started again ends in the same bits as one that never stopped."""

from __future__ import annotations

import json
import logging
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fedp2eft.errors import UserError
from fedp2eft.experiment.train import train
from fedp2eft.progress import LogReporter
from tiny_run import World, assert_same, outcome

# Few cells, so that a run takes a second or two.
SMALL = {
    "evaluation__ranks": [1],
    "evaluation__pools": ["unseen"],
    "evaluation__methods": ["base", "lora", "fedp2eft"],
}


class PowerCutError(Exception):
    """Thrown from inside a run in place of a power cut."""


class Stopper(LogReporter):
    """Calls back after the n-th finished unit (round or cell)."""

    def __init__(self, after: int, then: Any = None) -> None:
        super().__init__()
        self.left, self.then = after, then

    def advance(self, phase: str, text: str) -> None:
        super().advance(phase, text)
        self.left -= 1
        if self.left == 0:
            if isinstance(self.then, BaseException):
                raise self.then
            self.then()


@pytest.fixture(scope="module")
def small(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted small run; tests copy it or compare with it."""
    folder = tmp_path_factory.mktemp("small") / "run"
    train(world.settings(**SMALL), folder)
    return folder


def stopped(world: World, folder: Path, after: int, then: Any = None) -> None:
    """Run until `after` units are finished."""
    with pytest.raises((PowerCutError, KeyboardInterrupt)):
        train(world.settings(**SMALL), folder, Stopper(after, then or PowerCutError()))


def test_stopped_after_every_round_and_every_cell(world: World, small: Path, tmp_path: Path):
    units = 2 + 3 + 2 * 3  # base rounds, PSG rounds, cells
    for number in range(units):
        # in turn an exception and Ctrl-C
        stopped(world, tmp_path / "run", 1, KeyboardInterrupt() if number % 2 else PowerCutError())
    train(
        world.settings(**SMALL), tmp_path / "run", Stopper(1, PowerCutError())
    )  # nothing is left to do
    assert_same(outcome(tmp_path / "run"), outcome(small))


def test_stopped_inside_a_round(world: World, small: Path, tmp_path: Path):
    """The second client of a round fails; in the next process nothing of the round is left."""

    class Inside(LogReporter):
        def __init__(self, phase: str, client: int) -> None:
            super().__init__()
            self.phase, self.seen, self.client = phase, [], client

        def part(self, phase: str, fraction: float, text: str) -> None:
            if phase == self.phase and text not in self.seen:
                self.seen.append(text)
                if len(self.seen) == self.client:
                    raise PowerCutError

    for inside in (Inside("base", 2), Inside("psg", 2), Inside("personalize", 1)):
        with pytest.raises(PowerCutError):
            train(world.settings(**SMALL), tmp_path / "run", inside)
    train(world.settings(**SMALL), tmp_path / "run")
    assert_same(outcome(tmp_path / "run"), outcome(small))


def test_a_run_does_not_depend_on_what_was_drawn_before(world: World, small: Path, tmp_path: Path):
    import torch

    torch.manual_seed(1234)
    state = torch.get_rng_state()
    train(world.settings(**SMALL), tmp_path / "run")
    assert torch.equal(torch.get_rng_state(), state)
    assert_same(outcome(tmp_path / "run"), outcome(small))


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_a_damaged_newest_checkpoint(
    world: World, small: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
):
    folder = tmp_path / "run"
    shutil.copytree(small, folder)
    for name in ("cells", "adapters", "psg"):
        shutil.rmtree(folder / name)
    newest = folder / "checkpoints" / "psg-000003.safetensors"
    raw = bytearray(newest.read_bytes())
    raw[len(raw) // 2] ^= 1
    cut = {"truncated": raw[: len(raw) // 2], "flipped": raw, "empty": b""}[damage]
    newest.write_bytes(bytes(cut))
    with caplog.at_level(logging.WARNING):
        train(world.settings(**SMALL), folder)
    assert "psg-000003.safetensors is damaged" in caplog.text
    assert_same(outcome(folder), outcome(small))


def test_half_a_line_of_metrics(world: World, small: Path, tmp_path: Path):
    folder = tmp_path / "run"
    stopped(world, folder, 4)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"phase": "psg", "round": 3, "psg-lo')
    train(world.settings(**SMALL), folder)
    assert_same(outcome(folder), outcome(small))


def test_a_line_of_metrics_whose_checkpoint_was_never_written(
    world: World, small: Path, tmp_path: Path
):
    folder = tmp_path / "run"
    stopped(world, folder, 4)
    (folder / "checkpoints" / "psg-000002.safetensors").unlink()
    train(world.settings(**SMALL), folder)
    assert_same(outcome(folder), outcome(small))


def test_more_rounds_go_on_and_nothing_of_the_old_psg_is_left(
    world: World, small: Path, tmp_path: Path
):
    more = world.settings(**SMALL, federation__rounds=5)
    whole, grown = tmp_path / "whole", tmp_path / "grown"
    train(more, whole)
    shutil.copytree(small, grown)
    old = {path: path.stat().st_mtime_ns for path in grown.glob("cells/base-r0/*.json")}
    results = train(more, grown)
    assert_same(outcome(grown), outcome(whole))
    assert {path: path.stat().st_mtime_ns for path in old} == old  # φ plays no part in these
    assert outcome(grown)["psg/model.safetensors"] != outcome(small)["psg/model.safetensors"]
    assert {row.method for row in results.rows} == {"base", "lora", "fedp2eft"}


def test_fewer_rounds_than_are_done_is_an_error(world: World, small: Path, tmp_path: Path):
    folder = tmp_path / "run"
    shutil.copytree(small, folder)
    with pytest.raises(UserError, match=r"has 3 finished rounds, more than federation\.rounds = 1"):
        train(world.settings(**SMALL, federation__rounds=1), folder)
    assert_same(outcome(folder), outcome(small))
    assert (folder / "settings.yaml").read_bytes() == (small / "settings.yaml").read_bytes()


def test_more_cells_leave_the_old_ones_alone(world: World, small: Path, tmp_path: Path):
    folder = tmp_path / "run"
    shutil.copytree(small, folder)
    before = {path: path.stat().st_mtime_ns for path in folder.glob("cells/*/*.json")}
    train(world.settings(**SMALL | {"evaluation__ranks": [1, 2]}), folder)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(list(folder.glob("cells/*/*.json"))) == len(before) + 4


def test_a_damaged_cell_is_computed_again(world: World, small: Path, tmp_path: Path):
    folder = tmp_path / "run"
    shutil.copytree(small, folder)
    (folder / "cells" / "lora-r1" / "de-unseen-00.json").write_text('{"client": "de-uns')
    train(world.settings(**SMALL), folder)
    assert_same(outcome(folder), outcome(small))


# ── a full disk ─────────────────────────────────────────────────────────────────────────────────


def test_a_file_that_grows_too_large(world: World, small: Path, tmp_path: Path):
    """The operating system refuses the third checkpoint of the PSG (a limit on file sizes)."""
    folder = tmp_path / "run"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = Stopper(4, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, hard)))
    try:
        with pytest.raises(UserError) as caught:
            train(world.settings(**SMALL), folder, limit)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    check_refused(folder, str(caught.value))
    train(world.settings(**SMALL), folder)
    assert_same(outcome(folder), outcome(small))


def check_refused(folder: Path, message: str) -> None:
    assert "psg-000003.safetensors" in message
    assert "Free some space" in message
    assert "\n" not in message
    checkpoints = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert checkpoints == ["psg-000001.safetensors", "psg-000002.safetensors"]


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own, of the given size; skips where it cannot be mounted."""
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder],
        capture_output=True,
        check=False,
    )
    if done.returncode:
        pytest.skip("mounting a file system needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.skipif(shutil.which("mount") is None, reason="there is no mount command")
@pytest.mark.parametrize(
    ("unit", "named"),
    [(1, "base-000002.safetensors"), (4, "psg-000003.safetensors"), (5, "Could not write")],
)
def test_a_full_disk(world: World, small: Path, tmp_path: Path, unit: int, named: str):
    """The disk fills up after a unit; with room again the run goes on to the same bits."""
    with small_disk(tmp_path / "disk", "2m") as disk:
        filler = disk / "filler"

        def fill() -> None:
            with filler.open("wb", buffering=0) as file:
                try:
                    while file.write(bytes(1024)):
                        pass
                except OSError:
                    os.fsync(file.fileno())

        with pytest.raises(UserError) as caught:
            train(world.settings(**SMALL), disk / "run", Stopper(unit, fill))
        assert named in str(caught.value)
        assert "No space left" in str(caught.value)
        assert "\n" not in str(caught.value)
        kept = {path.name for path in (disk / "run" / "checkpoints").iterdir()}
        assert all(name.endswith(".safetensors") for name in kept)
        filler.unlink()
        train(world.settings(**SMALL), disk / "run")
        assert_same(outcome(disk / "run"), outcome(small))


def test_metrics_are_one_line_of_json_per_round(small: Path):
    lines = [json.loads(line) for line in (small / "metrics.jsonl").read_text().splitlines()]
    assert [(line["phase"], line["round"]) for line in lines] == [
        ("base", 1), ("base", 2), ("psg", 1), ("psg", 2), ("psg", 3),
    ]  # fmt: skip
    assert all(line["bytes-up"] > 0 and line["clients"] == 2 for line in lines)
