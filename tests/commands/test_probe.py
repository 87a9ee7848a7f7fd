"""What the quickstart says at its start: work is counted as a run does it, times are measured."""

from __future__ import annotations

from itertools import count

import pytest

from fedp2eft.cli import main
from fedp2eft.commands.probe import ASIDE, seconds_needed, work_of
from tiny_run import LENGTH, World

RUN = {
    "evaluation": {"methods": ["majority", "base", "lora", "fedp2eft"], "ranks": [1, 2]},
    "federation__clients_per_round": 2,
}


def test_work_is_counted_as_a_run_does_it(world: World) -> None:
    settings = world.settings(**RUN)
    steps = 2  # each client has 12 training rows; a batch holds 6
    tests = len(world.client_rows("de-unseen-00", "test"))
    work = work_of(settings)
    assert work.base_steps == 2 * 2 * steps  # rounds, clients a round
    # Stage 1 takes one pass; personalization two, for six clients, two methods and two budgets.
    assert work.adapter_steps == 3 * 2 * steps + 6 * 2 * 2 * 2 * steps
    assert work.passed_rows == 6 * ((1 + 2 * 2) * tests + 2 * 12) + 4 * 12


def test_seconds_are_counts_times_what_was_measured(world: World) -> None:
    settings = world.settings(**RUN)
    work = work_of(settings)
    ticks = count()
    found = seconds_needed(settings, clock=lambda: float(next(ticks)))  # all that is timed takes 1
    rows = work.passed_rows / settings.local.eval_batch_size
    assert found == pytest.approx(ASIDE + work.base_steps + work.adapter_steps + rows)
    assert settings.local.max_length == LENGTH


def test_a_quickstart_begins_with_its_time(world: World, tmp_path, capsys) -> None:
    options = [f"--model.name={world.encoder}", "--data.languages=[de]", "--data.max_train=4"]
    options += ["--data.max_test=2", "--base.rounds=1", "--federation.rounds=1"]
    options += ["--adapter.target_modules=all-linear", "--base.target_modules=null"]
    options += ["--local.max_length=12"]
    assert main(["quickstart", "--run", str(tmp_path / "run"), *options]) == 0
    told = capsys.readouterr().out
    assert told.startswith("About ")
    assert " on this machine as it is now (" in told.splitlines()[0]
    gains = told.index("Unseen clients (2): accuracy goes from")  # of "seen" too: only in `show`
    assert "Seen clients" not in told
    assert gains < told.index("unseen clients (2)", gains + 1) < told.index("with plain PEFT")
