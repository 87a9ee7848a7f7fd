"""Rounds that can be stopped after any one of them and gone on with.

Flower's own `Strategy.start` always begins at round 1, so the loop is ours; messages and
aggregation are those of Flower's strategies.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid
from torch import Tensor

from fedp2eft.errors import UserError
from fedp2eft.federation.server.admission import (
    Failures,
    Offer,
    mean_metrics,
    offer_of,
    weigh,
    within_limits,
)
from fedp2eft.federation.server.aggregation import Seeded, memory_of, remember
from fedp2eft.federation.server.exchange import exchange
from fedp2eft.federation.server.presence import wait_for_members
from fedp2eft.federation.server.privacy import Privacy
from fedp2eft.federation.server.run_folder import RunFolder
from fedp2eft.federation.wire.compression import DOWN, pack
from fedp2eft.federation.wire.messages import (
    ARRAYS,
    VALIDATION_LOSS,
    from_arrays,
    nbytes,
    to_arrays,
)
from fedp2eft.progress import Reporter
from fedp2eft.settings.experiment import Wire


def run_rounds(
    grid: Grid,
    run: RunFolder,
    strategy: Seeded,
    phase: str,
    rounds: int,
    first: dict[str, Tensor],
    reporter: Reporter,
    wire: Wire = "fp32",
    patience: int | None = None,
    privacy: Privacy | None = None,
) -> dict[str, Tensor]:
    """Rounds of one phase from where the run folder says it stands; returns the last numbers.

    Args:
        grid: The engine.
        run: Holds metrics and checkpoints.
        strategy: Samples and aggregates.
        phase: "base", "psg" or "fedl2p".
        rounds: Rounds in all.
        first: Numbers before round 1; their names and shapes are what every reply must have.
        reporter: Hears of every round.
        wire: What the numbers travel in.
        patience: Stop after as many rounds without a new lowest validation loss. The rounds before
            a stop are known from their metrics, so a resumed run stops where one in a piece does.
        privacy: Makes the rounds private, and ends them when its budget is spent.

    Raises:
        UserError: Too few clients, or the first failure where a failure ends the run.
    """
    if not strategy.members:
        raise UserError("No seen client is in the federation, so nothing can be trained.")
    done, kept = run.resume(phase, rounds)
    numbers = first if kept is None else {name: kept[name] for name in first}
    state = run.state(phase)
    remember(strategy, state)
    if privacy:
        privacy.remember(state, run)
    members = {member.node: member for member in strategy.members}
    bit = privacy.bit if privacy else None
    reporter.start(phase, rounds, done)
    watched = [kept[VALIDATION_LOSS] for kept in run.metrics(phase)] if patience else []
    for round_ in range(done + 1, rounds + 1):
        if patience and has_stalled(watched, patience):
            reporter.note(
                f"{phase}: stopped after round {round_ - 1}, the validation loss was lowest "
                f"{patience} rounds ago."
            )
            break
        if privacy and not privacy.allows(round_):
            reporter.note(privacy.told(f"{phase}: stopped after round {round_ - 1}"))
            break
        wait_for_members(grid, strategy.members, run.settings.federation, reporter)
        start = time.perf_counter()
        what = f"round {round_} of {phase}"
        if not privacy:  # with privacy, one that is not asked counts as one that failed
            strategy.leave_out(run.faults.quarantined)
        configured = privacy.strategy if privacy else strategy
        messages = list(
            configured.configure_train(round_, to_arrays(numbers), ConfigRecord(), grid)
        )
        messages = [
            message
            for message in messages
            if members[message.metadata.dst_node_id].client not in run.faults.quarantined
        ]
        arrays = pack(numbers, DOWN[wire])
        for message in messages:
            message.content[ARRAYS] = arrays
        if privacy:
            privacy.asking([members[message.metadata.dst_node_id] for message in messages], run)
        failures = Failures.on(grid, run.settings.peers, reporter, run.faults)
        offers: list[Offer] = []
        timeout = run.settings.federation.timeout
        for member, reply in exchange(grid, messages, members, timeout, what, failures):
            try:
                offers.append(offer_of(member.client, reply, numbers, wire, what, bit))
            except UserError as error:
                failures.add(member.client, str(error), "refused")
        bytes_up = sum(offer.nbytes for offer in offers)
        # Sums of floats depend on their order: the clients' names fix it.
        offers.sort(key=lambda offer: offer.client)
        limits = privacy.within_limits if privacy else within_limits
        offers = limits(offers, run.settings.peers.max_norm, failures, what)
        for offer in offers:
            failures.usable(offer.client)
        failures.check(len(offers), len(messages), what)
        cut = weigh(offers, run.settings.peers.max_examples, alike=privacy is not None)
        metrics: dict[str, Any] = mean_metrics(offers)
        if privacy is None:
            metrics["norm"] = median(offer.norm for offer in offers)
        numbers = _aggregate(strategy, privacy, round_, offers, first, what)
        metrics["clients"] = len(offers)
        metrics["bytes-down"] = nbytes(arrays) * len(messages)
        metrics["bytes-up"] = bytes_up
        if failures.reasons:
            metrics["left-out"] = dict(sorted(failures.reasons.items()))
        if cut:
            metrics["examples-cut"] = cut
        text = f"loss {metrics.get('psg-loss', metrics.get('loss')):.4g}"
        if privacy:
            metrics |= privacy.facts()
            text += f", ε {metrics['epsilon']:.3g}"
        state = memory_of(strategy) | (privacy.memory() if privacy else {})
        seconds = time.perf_counter() - start
        run.finish_round(phase, round_, numbers, metrics, seconds, state)
        reporter.advance(phase, text)
        if patience:
            watched.append(metrics[VALIDATION_LOSS])
    return numbers


def has_stalled(losses: Sequence[float], patience: int) -> bool:
    """Whether the last `patience` losses are all no lower than the lowest before them."""
    return len(losses) > patience and min(losses[-patience:]) >= min(losses[:-patience])


def _aggregate(
    strategy: Seeded,
    privacy: Privacy | None,
    round_: int,
    offers: Sequence[Offer],
    like: Mapping[str, Tensor],
    what: str,
) -> dict[str, Tensor]:
    replies: list[Message] = [offer.message for offer in offers]
    if privacy:
        arrays = privacy.aggregate(round_, replies)
    else:
        arrays, _ = strategy.aggregate_train(round_, replies)
    if arrays is None:
        raise UserError(f"No client answered in {what}: start again to repeat the round.")
    # Some of Flower's strategies compute in float64.
    record = ArrayRecord(
        {name: Array(array.numpy().astype(np.float32)) for name, array in arrays.items()}
    )
    return from_arrays(record, like, f"The average of {what}")
