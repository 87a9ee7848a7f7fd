"""How the server samples clients and makes one set of parameters of theirs.

The round loop knows an `Aggregator`: `Averaging` here, on Flower's strategies, or the private one
(`fedp2eft.federation.server.privacy`). Sampling depends on (seed, phase, round) alone, and what an
aggregator remembers from round to round is kept with the checkpoint: a run that resumes gives the
same bits.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from statistics import median
from typing import Any, Protocol, cast

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import (
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedTrimmedAvg,
    FedYogi,
    MultiKrum,
)
from torch import Tensor

from fedp2eft.client.phase import Phase
from fedp2eft.federation.server.admission import Failures, Offer, weigh, within_limits
from fedp2eft.federation.server.exchange import Member
from fedp2eft.federation.wire.messages import EXAMPLES, to_arrays
from fedp2eft.seeding import derive_seed
from fedp2eft.settings.experiment import Settings
from fedp2eft.settings.peers import AggregationSettings

ADAPTIVE = (FedAdagrad, FedAdam, FedYogi)
SERVER_OPTIMISERS = {"fedavgm", "fedadagrad", "fedadam", "fedyogi"}


class Seeded(FedAvg):
    """FedAvg weighted by N whose sample of clients depends on (seed, phase, round) alone.

    Attributes:
        members: Clients to sample from, by name.
        size: How many are sampled.
        message_type: Of the messages to them.
    """

    members: list[Member]
    size: int
    seed: int
    message_type: str

    def sample_from(
        self, members: Iterable[Member], clients_per_round: int, seed: int, message_type: str
    ) -> None:
        """Set whom to sample.

        Args:
            members: Clients to sample from.
            clients_per_round: How many to sample.
            seed: The experiment's seed.
            message_type: `Phase.kind`.
        """
        self.members = sorted(members, key=lambda member: member.client)
        self.size = min(clients_per_round, len(self.members))
        self.seed = seed
        self.message_type = message_type

    def sample(self, server_round: int) -> list[Member]:
        """This round's clients, in the order of their names."""
        draw = random.Random(derive_seed(self.seed, self.message_type, server_round))
        return [self.members[i] for i in sorted(draw.sample(range(len(self.members)), self.size))]

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Messages to this round's sample, in the order of the clients' names."""
        config["server-round"] = server_round
        record = RecordDict({self.arrayrecord_key: arrays, self.configrecord_key: config})
        sample = self.sample(server_round)
        return [Message(record, member.node, self.message_type) for member in sample]


class SeededFedAvg(Seeded):
    """FedAvg; for its arguments see `Seeded.sample_from`."""

    def __init__(
        self, members: Iterable[Member], clients_per_round: int, seed: int, message_type: str
    ) -> None:
        super().__init__(weighted_by_key=EXAMPLES)
        self.sample_from(members, clients_per_round, seed, message_type)


class Krum(MultiKrum):
    """Flower's Krum and Multi-Krum in float64, for any number of replies.

    Args:
        hostile: Share of the replies that may be hostile: f of n.
        select: "one" client, or "many": n - f of them.
        options: FedAvg's.
    """

    def __init__(self, *, hostile: float, select: str, **options: Any) -> None:
        super().__init__(**options)
        self._hostile = hostile
        self._select = select

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The mean of the clients that are nearest to their neighbours."""
        replies = list(replies)
        self.num_malicious_nodes = math.ceil(self._hostile * len(replies))
        many = max(1, len(replies) - self.num_malicious_nodes)
        self.num_nodes_to_select = many if self._select == "many" else 1
        for reply in replies:
            # Flower takes distances as x² + y² - 2xy: in float32 nothing is left of small changes.
            for record in reply.content.array_records.values():
                for name, array in list(record.items()):
                    record[name] = Array(array.numpy().astype(np.float64))
        return super().aggregate_train(server_round, replies)


def strategy(
    settings: AggregationSettings,
    members: Iterable[Member],
    clients_per_round: int,
    seed: int,
    message_type: str,
    optimize: bool = True,
) -> Seeded:
    """The strategy of that name.

    Args:
        settings: Its name and parameters.
        members: Clients to sample from.
        clients_per_round: How many to sample.
        seed: The experiment's seed.
        message_type: Of the messages to them.
        optimize: Whether server optimizers apply; the mean in their place where they do not.
    """
    s = settings
    kind = s.kind if optimize or s.kind not in SERVER_OPTIMISERS else "fedavg"
    adaptive = {"eta": s.server_lr or 1e-3, "tau": s.tau}
    moments = adaptive | {"beta_1": s.beta1, "beta_2": s.beta2}
    kinds: dict[str, tuple[type[FedAvg], dict[str, Any]]] = {
        "fedavg": (FedAvg, {}),
        "fedmedian": (FedMedian, {}),
        "trimmed-mean": (FedTrimmedAvg, {"beta": s.hostile}),
        "krum": (Krum, {"hostile": s.hostile, "select": "one"}),
        "multi-krum": (Krum, {"hostile": s.hostile, "select": "many"}),
        "fedavgm": (
            FedAvgM,
            {"server_learning_rate": s.server_lr or 1.0, "server_momentum": s.momentum},
        ),
        "fedadagrad": (FedAdagrad, adaptive),
        "fedadam": (FedAdam, moments),
        "fedyogi": (FedYogi, moments),
    }
    flower, options = kinds[kind]
    # Flower's class first: its `configure_train` hands on to ours, ours aggregates with its.
    bases = (Seeded,) if flower is FedAvg else (flower, Seeded)
    made = type(f"Seeded{flower.__name__}", bases, {})(weighted_by_key=EXAMPLES, **options)
    made.sample_from(members, clients_per_round, seed, message_type)
    return cast(Seeded, made)


class Aggregator(Protocol):
    """Samples the clients of each round and makes one set of parameters of theirs."""

    @property
    def members(self) -> Sequence[Member]:
        """The clients that may be sampled, by name."""

    @property
    def bit(self) -> str | None:
        """A metric of 0 or 1 that clients report to it beside the phase's."""

    def remember(self, kept: Mapping[str, Tensor]) -> None:
        """Resume from what was kept with a checkpoint."""

    def spent(self, round_: int) -> str | None:
        """Why there cannot be this round, if there cannot: the rest of a sentence."""

    def configure(
        self, round_: int, parameters: Mapping[str, Tensor], grid: Grid, without: Collection[str]
    ) -> list[Message]:
        """Sample clients; return a message to each, those aside that are not to be asked."""

    def limits(self, offers: Sequence[Offer], failures: Failures, what: str) -> list[Offer]:
        """The offers that may be averaged."""

    def aggregate(
        self, round_: int, offers: Sequence[Offer]
    ) -> tuple[ArrayRecord | None, dict[str, Any]]:
        """Weigh and average the offers; return facts for the round's metrics, too."""

    def memory(self) -> dict[str, Tensor]:
        """What must be known to resume after this round, by name."""


class Averaging:
    """The strategy that the settings name, its clients sampled from the seed.

    Args:
        settings: The experiment.
        phase: Whose rounds they are.
        members: Clients to sample from.
    """

    bit = None

    def __init__(self, settings: Settings, phase: Phase, members: Iterable[Member]) -> None:
        s = settings
        self.strategy = strategy(
            s.aggregation, members, s.value(phase.clients), s.seed, phase.kind, phase.optimize
        )
        self._peers = s.peers

    @property
    def members(self) -> Sequence[Member]:
        """The clients that may be sampled."""
        return self.strategy.members

    def remember(self, kept: Mapping[str, Tensor]) -> None:
        """Resume from its moments or momentum."""
        remember(self.strategy, kept)

    def spent(self, round_: int) -> str | None:
        """Rounds are free."""
        return None

    def configure(
        self, round_: int, parameters: Mapping[str, Tensor], grid: Grid, without: Collection[str]
    ) -> list[Message]:
        """Sample among the clients that may be asked."""
        chosen = self.strategy
        chosen.members = [member for member in chosen.members if member.client not in without]
        chosen.size = min(chosen.size, len(chosen.members))
        arrays = to_arrays(parameters)
        return list(chosen.configure_train(round_, arrays, ConfigRecord(), grid))

    def limits(self, offers: Sequence[Offer], failures: Failures, what: str) -> list[Offer]:
        """The offers that are not too far from the round's median."""
        return within_limits(offers, self._peers.max_norm, failures, what)

    def aggregate(
        self, round_: int, offers: Sequence[Offer]
    ) -> tuple[ArrayRecord | None, dict[str, Any]]:
        """Average them, weighted by N up to the limit."""
        cut = weigh(offers, self._peers.max_examples)
        facts: dict[str, Any] = {"norm": median(offer.norm for offer in offers)}
        arrays, _ = self.strategy.aggregate_train(round_, [offer.message for offer in offers])
        return arrays, facts | ({"examples-cut": cut} if cut else {})

    def memory(self) -> dict[str, Tensor]:
        """Its moments or momentum."""
        return memory_of(self.strategy)


def memory_of(strategy: Seeded) -> dict[str, Tensor]:
    """What a strategy remembers from round to round: moments or momentum, by name."""
    kept: dict[str, Any] = {}
    if isinstance(strategy, ADAPTIVE):
        for moment in ("m_t", "v_t"):
            for name, value in (getattr(strategy, moment) or {}).items():
                kept[f"{moment}/{name}"] = value
    if isinstance(strategy, FedAvgM):
        for i, value in enumerate(strategy.momentum_vector or []):
            kept[f"momentum/{i:06d}"] = value
    return {name: torch.from_numpy(np.array(value)) for name, value in kept.items()}


def remember(strategy: Seeded, kept: Mapping[str, Tensor]) -> None:
    """Give a strategy back what it remembered."""

    def part(of: str) -> dict[str, Any]:
        return {n.partition("/")[2]: v.numpy() for n, v in kept.items() if n.startswith(f"{of}/")}

    if isinstance(strategy, ADAPTIVE):
        strategy.m_t, strategy.v_t = part("m_t") or None, part("v_t") or None
    if isinstance(strategy, FedAvgM):
        momentum = part("momentum")
        strategy.momentum_vector = [momentum[i] for i in sorted(momentum)] or None
