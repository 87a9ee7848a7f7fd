"""How the server samples clients and aggregates their parameters.

`Averaging` is the plain one, on Flower's strategies; `fedp2eft.federation.server.privacy` has the
private one. Sampling depends on (seed, phase, round) alone, and what an
aggregator remembers from round to round is kept with the checkpoint: a run that resumes gives the
same bits.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from statistics import median
from typing import Any, TypeVar

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp import strategy as flower
from torch import Tensor

from fedp2eft.client.phase import Phase
from fedp2eft.federation.server.admission import Failures, Offer, weigh, within_limits
from fedp2eft.federation.server.exchange import Member
from fedp2eft.federation.wire.messages import ARRAYS, CONFIG, EXAMPLES, METRICS, to_arrays
from fedp2eft.seeding import derive_seed
from fedp2eft.settings.experiment import Settings
from fedp2eft.settings.peers import AggregationSettings

S = TypeVar("S", bound=flower.FedAvg)
ADAPTIVE = (flower.FedAdagrad, flower.FedAdam, flower.FedYogi)
SERVER_OPTIMISERS = {"fedavgm", "fedadagrad", "fedadam", "fedyogi"}


class Krum(flower.MultiKrum):
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
        """Return the mean of the clients that are nearest to their neighbours."""
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


def strategy(settings: AggregationSettings, optimize: bool = True) -> flower.FedAvg:
    """Return Flower's strategy of that name; it samples nobody itself.

    Args:
        settings: Its name and parameters.
        optimize: Whether server optimizers apply; the mean in their place where they do not.
    """
    s = settings
    kind = s.kind if optimize or s.kind not in SERVER_OPTIMISERS else "fedavg"
    momentum = {"server_learning_rate": s.server_lr or 1.0, "server_momentum": s.momentum}
    adaptive = {"eta": s.server_lr or 1e-3, "tau": s.tau}
    moments = adaptive | {"beta_1": s.beta1, "beta_2": s.beta2}
    kinds: dict[str, tuple[type[flower.FedAvg], dict[str, Any]]] = {
        "fedavg": (flower.FedAvg, {}),
        "fedmedian": (flower.FedMedian, {}),
        "trimmed-mean": (flower.FedTrimmedAvg, {"beta": s.hostile}),
        "krum": (Krum, {"hostile": s.hostile, "select": "one"}),
        "multi-krum": (Krum, {"hostile": s.hostile, "select": "many"}),
        "fedavgm": (flower.FedAvgM, momentum),
        "fedadagrad": (flower.FedAdagrad, adaptive),
        "fedadam": (flower.FedAdam, moments),
        "fedyogi": (flower.FedYogi, moments),
    }
    made, options = kinds[kind]
    return sampling_nobody(made(weighted_by_key=EXAMPLES, **options))


def sampling_nobody(strategy: S) -> S:
    """Return a strategy of Flower's that no longer samples clients, nor waits for them.

    Its constructor takes the same share, and warns that nothing is trained: `Averaging` samples.
    """
    strategy.fraction_train = 0.0
    return strategy


class Averaging:
    """Samples the clients of each round, and aggregates their parameters.

    Args:
        settings: The experiment; its `aggregation` names the strategy.
        phase: Whose rounds they are.
        members: Clients to sample from.

    Attributes:
        members: The clients that may be sampled, by name.
        size: How many are sampled.
        strategy: Averages.
        entries: Number of entries of all parameters; known before the first round.
        bit: A metric of 0 or 1 that clients report to it beside the phase's.
    """

    bit: str | None = None
    entries: int = 0

    def __init__(self, settings: Settings, phase: Phase, members: Iterable[Member]) -> None:
        self.members = sorted(members, key=lambda member: member.client)
        self.size = min(settings.value(phase.clients), len(self.members))
        self.strategy: flower.Strategy = strategy(settings.aggregation, phase.optimize)
        self._kind, self._seed, self._peers = phase.kind, settings.seed, settings.peers

    def sample(self, round_: int) -> list[Member]:
        """Return the round's clients by name; they depend on (seed, phase, round) alone."""
        return self._drawn(random.Random(derive_seed(self._seed, self._kind, round_)))

    def _drawn(self, draw: random.Random) -> list[Member]:
        return [self.members[i] for i in sorted(draw.sample(range(len(self.members)), self.size))]

    def spent(self, round_: int) -> str | None:
        """Return why there cannot be this round, as the rest of a sentence; None if there can."""
        return None

    def configure(
        self, round_: int, parameters: Mapping[str, Tensor], grid: Grid, without: Collection[str]
    ) -> list[Message]:
        """Sample among the clients that may be asked; return a message to each, by name."""
        self.members = [member for member in self.members if member.client not in without]
        self.size = min(self.size, len(self.members))
        return self._messages(round_, parameters, grid, self.sample(round_))

    def _messages(
        self, round_: int, parameters: Mapping[str, Tensor], grid: Grid, sample: Iterable[Member]
    ) -> list[Message]:
        arrays, config = to_arrays(parameters), ConfigRecord({"server-round": round_})
        # Flower's strategy keeps the arrays, and adds to the config what clients must know.
        self.strategy.configure_train(round_, arrays, config, grid)
        content = RecordDict({ARRAYS: arrays, CONFIG: config})
        return [Message(content, member.node, self._kind) for member in sample]

    def limits(self, offers: Sequence[Offer], failures: Failures, what: str) -> list[Offer]:
        """Return the offers that are not too far from the round's median."""
        return within_limits(offers, self._peers.max_norm, failures, what)

    def aggregate(
        self, round_: int, offers: Sequence[Offer]
    ) -> tuple[ArrayRecord | None, dict[str, Any]]:
        """Average the offers, weighted by N up to the limit; also facts for the round's metrics."""
        cut = weigh(offers, self._peers.max_examples)
        facts: dict[str, Any] = {"norm": median(offer.norm for offer in offers)}
        arrays, _ = self.strategy.aggregate_train(round_, [offer.message for offer in offers])
        return arrays, facts | ({"examples-cut": cut} if cut else {})

    def before_unmasking(self, names: Sequence[str]) -> None:
        """Take note of whose values are in a secure sum, before anything is learned of it."""

    def of_sum(
        self, round_: int, sent: Mapping[str, Tensor], sums: Mapping[str, Any], weight: int
    ) -> tuple[ArrayRecord | None, dict[str, Any]]:
        """Average a secure sum of the weighted changes of what was sent, as one reply's."""
        arrays = ArrayRecord(
            {
                name: Array((value.double().numpy() + sums[name] / weight).astype(np.float32))
                for name, value in sent.items()
            }
        )
        content = RecordDict({ARRAYS: arrays, METRICS: MetricRecord({EXAMPLES: 1})})
        averaged, _ = self.strategy.aggregate_train(round_, [Message(content, 1, self._kind)])
        return averaged, {}

    def memory(self) -> dict[str, Tensor]:
        """Return what is needed to resume after this round, by name: moments or momentum."""
        kept: dict[str, Any] = {}
        if isinstance(self.strategy, ADAPTIVE):
            for moment in ("m_t", "v_t"):
                for name, value in (getattr(self.strategy, moment) or {}).items():
                    kept[f"{moment}/{name}"] = value
        if isinstance(self.strategy, flower.FedAvgM):
            for i, value in enumerate(self.strategy.momentum_vector or []):
                kept[f"momentum/{i:06d}"] = value
        return {name: torch.from_numpy(np.array(value)) for name, value in kept.items()}

    def remember(self, kept: Mapping[str, Tensor]) -> None:
        """Resume from what was kept with a checkpoint."""

        def part(of: str) -> dict[str, Any]:
            name = f"{of}/"
            return {n.removeprefix(name): v.numpy() for n, v in kept.items() if n.startswith(name)}

        if isinstance(self.strategy, ADAPTIVE):
            self.strategy.m_t, self.strategy.v_t = part("m_t") or None, part("v_t") or None
        if isinstance(self.strategy, flower.FedAvgM):
            momentum = part("momentum")
            self.strategy.momentum_vector = [momentum[i] for i in sorted(momentum)] or None
