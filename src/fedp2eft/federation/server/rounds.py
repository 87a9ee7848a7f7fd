"""Federated rounds of one phase; they can be stopped after any of them, and resume.

Flower's own `Strategy.start` always begins at round 1, so the loop is ours; messages and
aggregation are those of Flower's strategies.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.serverapp import Grid
from torch import Tensor

from fedp2eft.client.phase import VALIDATION_LOSS, Phase
from fedp2eft.errors import UserError
from fedp2eft.federation.server.admission import Failures
from fedp2eft.federation.server.aggregation import Averaging
from fedp2eft.federation.server.averages import Round, average
from fedp2eft.federation.server.checkpoints import Checkpoint
from fedp2eft.federation.server.presence import wait_for_members
from fedp2eft.federation.server.run_folder import RunFolder
from fedp2eft.federation.wire.compression import DOWN, pack
from fedp2eft.federation.wire.messages import (
    ARRAYS,
    CONFIG,
    from_arrays,
    the_config,
    with_label_prior,
)
from fedp2eft.progress import Reporter


def run_rounds(
    grid: Grid,
    run: RunFolder,
    phase: Phase,
    aggregator: Averaging,
    first: Mapping[str, Tensor],
    reporter: Reporter,
) -> dict[str, Tensor]:
    """Run a phase's rounds from where the run folder stands; return the last parameters.

    Args:
        grid: The engine.
        run: Holds metrics and checkpoints.
        phase: What is trained.
        aggregator: Samples clients and averages.
        first: Parameters before round 1; their names and shapes are what every reply must have.
        reporter: Receives the progress.

    Raises:
        UserError: Too few clients, or the first failure where a failure ends the run.
    """
    if not aggregator.members:
        raise UserError("No seen client is in the federation, so nothing can be trained.")
    s, rounds = run.settings, run.settings.value(phase.rounds)
    # Resume: the rounds before a stop are known from checkpoint and metrics, so a resumed run
    # stops where one in a piece does.
    last = run.resume(phase.name, rounds) or Checkpoint(phase.name, 0, dict(first))
    done, parameters = last.round, {name: last.parameters[name] for name in first}
    aggregator.remember(last.state)
    aggregator.entries = sum(value.numel() for value in first.values())
    watched = [line[VALIDATION_LOSS] for line in run.metrics(phase.name)] if phase.patience else []
    reporter.start(phase.name, rounds, done)
    for round_ in range(done + 1, rounds + 1):
        if why := _stalled(watched, phase, run) or aggregator.spent(round_):
            reporter.note(f"{phase.name}: stopped after round {round_ - 1}{why}")
            break
        wait_for_members(grid, aggregator.members, s.federation, reporter)
        start = time.perf_counter()
        # 1. Sample clients, and send them the parameters.
        messages = aggregator.configure(round_, parameters, grid, run.faults.quarantined)
        arrays = pack(parameters, DOWN[phase.wire_of(s)])
        for message in messages:
            message.content[ARRAYS] = arrays
            message.content[CONFIG] = with_label_prior(the_config(message), run.label_prior)
        # 2. Each of them trains on its own rows; average: θ ← Σ_k w_k·θ_k over those in time.
        failures = Failures.on(grid, s.peers, reporter, run.faults)
        this = Round(grid, s, phase, aggregator, round_, messages, parameters, failures)
        averaged, metrics = average(this)
        parameters = _checked(averaged, first, this.what)
        # 3. Keep the round: it counts as soon as its checkpoint is written.
        if failures.reasons:
            metrics["left-out"] = dict(sorted(failures.reasons.items()))
        seconds = time.perf_counter() - start
        finished = Checkpoint(phase.name, round_, parameters, aggregator.memory())
        run.finish_round(finished, metrics, seconds)
        reporter.advance(phase.name, _shown(phase, metrics))
        watched += [metrics[VALIDATION_LOSS]] if phase.patience else []
    return parameters


def _stalled(watched: Sequence[float], phase: Phase, run: RunFolder) -> str | None:
    """Return why the phase ends here, as the rest of a sentence; None if it does not."""
    if not phase.patience or not has_stalled(watched, run.settings.value(phase.patience)):
        return None
    patience = run.settings.value(phase.patience)
    return f", the validation loss was lowest {patience} rounds ago."


def has_stalled(losses: Sequence[float], patience: int) -> bool:
    """Return whether the last `patience` losses are all no lower than the lowest before."""
    return len(losses) > patience and min(losses[-patience:]) >= min(losses[:-patience])


def _checked(
    averaged: ArrayRecord | None, like: Mapping[str, Tensor], what: str
) -> dict[str, Tensor]:
    if averaged is None:
        raise UserError(f"No client replied in {what}: start again to repeat the round.")
    # Some of Flower's strategies compute in float64.
    record = ArrayRecord(
        {name: Array(array.numpy().astype(np.float32)) for name, array in averaged.items()}
    )
    return from_arrays(record, like, f"The average of {what}")


def _shown(phase: Phase, metrics: Mapping[str, Any]) -> str:
    """Return the most telling metrics of a round."""
    named = {"loss": "".join(phase.metrics[:1]), "ε": "epsilon"}
    digits = {"loss": 4, "ε": 3}
    found = {name: metrics[key] for name, key in named.items() if key in metrics}
    return ", ".join(f"{name} {value:.{digits[name]}g}" for name, value in found.items())
