"""Federated rounds of one phase; they can be stopped after any of them, and resume.

Flower's own `Strategy.start` always begins at round 1, so the loop is ours; messages and
aggregation are those of Flower's strategies.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Message
from flwr.serverapp import Grid
from torch import Tensor

from fedp2eft.client.phase import VALIDATION_LOSS, Phase
from fedp2eft.errors import UserError
from fedp2eft.federation.server.admission import Failures, Offer, mean_metrics, offer_of
from fedp2eft.federation.server.aggregation import Averaging
from fedp2eft.federation.server.checkpoints import Checkpoint
from fedp2eft.federation.server.exchange import exchange
from fedp2eft.federation.server.presence import wait_for_members
from fedp2eft.federation.server.run_folder import RunFolder
from fedp2eft.federation.wire.compression import DOWN, pack
from fedp2eft.federation.wire.messages import (
    ARRAYS,
    CONFIG,
    from_arrays,
    nbytes,
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
    watched = [line[VALIDATION_LOSS] for line in run.metrics(phase.name)] if phase.patience else []
    reporter.start(phase.name, rounds, done)
    for round_ in range(done + 1, rounds + 1):
        if why := _stalled(watched, phase, run) or aggregator.spent(round_):
            reporter.note(f"{phase.name}: stopped after round {round_ - 1}{why}")
            break
        wait_for_members(grid, aggregator.members, s.federation, reporter)
        start, what = time.perf_counter(), f"round {round_} of {phase.name}"
        # 1. Sample clients, and send them the parameters.
        messages = aggregator.configure(round_, parameters, grid, run.faults.quarantined)
        arrays = pack(parameters, DOWN[phase.wire_of(s)])
        for message in messages:
            message.content[ARRAYS] = arrays
            message.content[CONFIG] = with_label_prior(the_config(message), run.label_prior)
        # 2. Each of them trains on its own rows. Check every reply by itself.
        failures = Failures.on(grid, s.peers, reporter, run.faults)
        offers = _offers(grid, run, phase, aggregator, messages, parameters, what, failures)
        bytes_up = sum(offer.nbytes for offer in offers)
        # 3. Leave out what must not count, looking at the replies together.
        offers = aggregator.limits(offers, failures, what)
        for offer in offers:
            failures.usable(offer.client)
        failures.check(len(offers), len(messages), what)
        # 4. Average: θ ← Σ_k w_k·θ_k over the clients k that are left.
        averaged, facts = aggregator.aggregate(round_, offers)
        parameters = _checked(averaged, first, what)
        # 5. Keep the round: it counts as soon as its checkpoint is written.
        metrics: dict[str, Any] = mean_metrics(offers) | facts
        metrics["clients"] = len(offers)
        metrics["bytes-down"] = nbytes(arrays) * len(messages)
        metrics["bytes-up"] = bytes_up
        if failures.reasons:
            metrics["left-out"] = dict(sorted(failures.reasons.items()))
        seconds = time.perf_counter() - start
        finished = Checkpoint(phase.name, round_, parameters, aggregator.memory())
        run.finish_round(finished, metrics, seconds)
        reporter.advance(phase.name, _shown(phase, metrics))
        watched += [metrics[VALIDATION_LOSS]] if phase.patience else []
    return parameters


def _stalled(watched: Sequence[float], phase: Phase, run: RunFolder) -> str | None:
    """Why the phase ends here, if it does: the rest of a sentence."""
    if not phase.patience or not has_stalled(watched, run.settings.value(phase.patience)):
        return None
    patience = run.settings.value(phase.patience)
    return f", the validation loss was lowest {patience} rounds ago."


def has_stalled(losses: Sequence[float], patience: int) -> bool:
    """Whether the last `patience` losses are all no lower than the lowest before them."""
    return len(losses) > patience and min(losses[-patience:]) >= min(losses[:-patience])


def _offers(
    grid: Grid,
    run: RunFolder,
    phase: Phase,
    aggregator: Averaging,
    messages: Sequence[Message],
    sent: Mapping[str, Tensor],
    what: str,
    failures: Failures,
) -> list[Offer]:
    """Replies that are what they should be, in the order of the clients' names.

    Sums of floats depend on their order: the names fix it.
    """
    members = {member.node: member for member in aggregator.members}
    wire, timeout = phase.wire_of(run.settings), run.settings.federation.timeout
    offers: list[Offer] = []
    for member, reply in exchange(grid, messages, members, timeout, what, failures):
        try:
            offers.append(
                offer_of(member.client, reply, sent, wire, what, phase.metrics, aggregator.bit)
            )
        except UserError as error:
            failures.add(member.client, str(error), "refused")
    return sorted(offers, key=lambda offer: offer.client)


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
    """The most telling numbers of a round."""
    named = {"loss": "".join(phase.metrics[:1]), "ε": "epsilon"}
    digits = {"loss": 4, "ε": 3}
    found = {name: metrics[key] for name, key in named.items() if key in metrics}
    return ", ".join(f"{name} {value:.{digits[name]}g}" for name, value in found.items())
