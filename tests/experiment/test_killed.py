"""Real processes, killed and interrupted."""

from __future__ import annotations

import multiprocessing as mp
import random
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

import pytest

from fedp2eft.cli import main
from fedp2eft.errors import UserError
from fedp2eft.experiment.train import train
from tiny_run import World, assert_same, command, environment, outcome, train_in_process

KILLS = 6
SMALL = {"evaluation__ranks": [1], "evaluation__methods": ["base", "fedp2eft"]}


def units(run: Path) -> int:
    """Finished rounds and cells."""
    metrics = run / "metrics.jsonl"
    rounds = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
    return rounds + len(list(run.glob("cells/*/*.json")))


def test_killed_at_random_moments(world: World, tmp_path: Path):
    """SIGKILL, again and again, until the run is complete: the same bits as without."""
    train(world.settings(), tmp_path / "whole")
    config = world.config
    run, draw = tmp_path / "run", random.Random(20)
    # A fork server imports everything once; each process is a real one of its own.
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["fedp2eft.experiment.train", "fedp2eft.commands.run"])
    kills, status = 0, None
    while status != 0:
        process = context.Process(target=train_in_process, args=(str(config), str(run)))
        process.start()
        if kills < KILLS:
            wanted = units(run) + draw.randint(0, 2)
            while units(run) < wanted and process.is_alive():
                time.sleep(0.005)
            time.sleep(draw.uniform(0.0, 0.05))
            process.kill()
        process.join()
        status = process.exitcode
        assert status in (0, -signal.SIGKILL)
        kills += status != 0
    assert kills >= 5
    assert_same(outcome(run), outcome(tmp_path / "whole"))


def test_ctrl_c_says_how_to_go_on_and_one_process_works_at_a_time(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = world.yaml(tmp_path / "small.yaml", **SMALL)
    run = tmp_path / "run"
    process = subprocess.Popen(
        command("train", config, "--run", run), env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        # a shell's background jobs ignore SIGINT, and so would this one
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if line.startswith("base model 1/2"):
                break
        process.send_signal(signal.SIGSTOP)  # however slow this process is, that one is at work
        # meanwhile, the same command here
        assert main(["train", str(config), "--run", str(run)]) == 2
        error = capsys.readouterr().err
        assert "Another process is working on" in error
        assert error.count("\n") == 1
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGCONT)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert error.count("\n") == 1
    assert "start the same command again to resume" in error
    assert str(run) in error
    train(world.settings(**SMALL), run)
    train(world.settings(**SMALL), tmp_path / "whole")
    assert_same(outcome(run), outcome(tmp_path / "whole"))


def test_an_interrupt_is_no_users_mistake_to_a_library_user(world: World, tmp_path: Path):
    from fedp2eft.progress import LogReporter

    class Impatient(LogReporter):
        def advance(self, phase: str, text: str) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(world.settings(**SMALL), tmp_path / "run", Impatient())
    with pytest.raises(UserError, match="another experiment: seed is 3 there and 4 here"):
        train(world.settings(**SMALL, seed=4), tmp_path / "run")
