"""Client-level differential privacy of φ, on Flower's own strategies and mods (docs/privacy.md).

Every sampled client's change of φ is cut to the norm C and all changes have the same weight:
φ ← φ + (1/n)·(Σ clip(φ_k − φ) + N(0, (z·C)²)), n being the number of clients sampled, whoever of
them failed (McMahan et al. 2018). A client that does not answer counts as one that changed nothing,
so no client's failure makes the others' shares larger than the noise was made for.

ε, from dp-accounting through Flower's accountant, is that of one client against one that changes
nothing. `sampling: seeded` hides nobody's part in a round: Gaussian mechanisms, as many as the
client that took part most often took part in, nothing taken off for sampling. `sampling: secret`:
in every round n of N clients without replacement, one client in place of another, which moves the
sum by up to 2C.
"""

from __future__ import annotations

import logging
import math
import random
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import (
    GaussianPrivacyEvent,
    Grid,
    NeighboringRelation,
    PrivacyConfig,
    SamplingMethod,
)
from flwr.serverapp import strategy as flower
from torch import Tensor

from fedp2eft.client.phase import Phase
from fedp2eft.errors import UserError
from fedp2eft.federation.hooks import ClientQuantile, ServerQuantile, noise_from
from fedp2eft.federation.server.admission import Failures, Offer, weigh
from fedp2eft.federation.server.aggregation import Averaging, sampling_nobody
from fedp2eft.federation.server.exchange import Member
from fedp2eft.federation.wire.messages import EXAMPLES
from fedp2eft.files import read_json, write_json
from fedp2eft.runtime.client_rows import LABEL_PRIOR_FILE
from fedp2eft.seeding import derive_seed
from fedp2eft.settings.experiment import Settings

ASKED = "privacy.json"
TAKEN = "privacy/taken/"
NORM, ROUNDS = "privacy/clip-norm", "privacy/rounds"
ROUNDING = 1e-3  # how far above the norm a clipped change may come out in fp32


class SampledMean(flower.FedAvg):
    """The mean over the sampled clients, those that failed counting as unchanged.

    Args:
        size: How many clients are sampled.
    """

    def __init__(self, size: int) -> None:
        super().__init__(weighted_by_key=EXAMPLES)
        sampling_nobody(self)
        self._size = size
        self._sent = ArrayRecord()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Configure as Flower does; keep the parameters for clients that fail."""
        self._sent = arrays
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the mean, moved towards what was sent by the share of those that failed."""
        replies = list(replies)
        mean, metrics = super().aggregate_train(server_round, replies)
        share = len(replies) / self._size
        if mean is not None and share < 1:
            sent = {name: array.numpy() for name, array in self._sent.items()}
            mean = ArrayRecord(
                {n: Array(sent[n] + share * (a.numpy() - sent[n])) for n, a in mean.items()}
            )
        return mean, metrics


class Private(Averaging):
    """Clips, averages with noise, and keeps account of it.

    Args:
        settings: The experiment.
        phase: Whose rounds they are.
        members: Clients to sample from.
        folder: The run folder.

    Attributes:
        strategy: Clips and adds noise around the mean.
        bit: The metric by which a client reports whether it clipped, where the norm adapts to that.

    Raises:
        UserError: dp-accounting is not installed.
    """

    def __init__(
        self, settings: Settings, phase: Phase, members: Sequence[Member], folder: Path
    ) -> None:
        super().__init__(settings, phase, members)
        s = self.settings = settings.privacy
        self.strategy = self._strategy()
        self.bit = "norm_bit" if s.clipping == "adaptive" and s.clip_on == "client" else None
        self._folder = folder
        self._taken: Counter[str] = Counter()
        self._asked: list[str] = []
        known = read_json(folder / LABEL_PRIOR_FILE) or {}
        self._label_answers = int(known.get("asked", 0))
        self._rounds = 0
        self._norm = s.clip_norm
        if members:
            self.epsilon({"": 1}, 1)  # what is missing is missed before the first round

    def _strategy(self) -> flower.Strategy:
        s, size = self.settings, max(1, self.size)
        mean = SampledMean(size)
        if s.noise == "client":
            return mean  # Flower's LocalDpMod does it all, on the client
        # The count of clients below the norm is noised too; this much leaves most of z to φ.
        count_noise = max(size / 20, s.noise_multiplier)
        if s.clipping == "fixed":
            fixed = {
                "server": flower.DifferentialPrivacyServerSideFixedClipping,
                "client": flower.DifferentialPrivacyClientSideFixedClipping,
            }[s.clip_on]
            return fixed(mean, s.noise_multiplier, s.clip_norm, size)
        adaptive = {"server": ServerQuantile, "client": ClientQuantile}[s.clip_on]
        return adaptive(
            mean, s.noise_multiplier, size, s.clip_norm, s.quantile, s.clip_lr, count_noise
        )

    # ── rounds ──────────────────────────────────────────────────────────────────────────────────

    def sample(self, round_: int) -> list[Member]:
        """Return the round's clients; a secret sample is another one each time it is asked for."""
        if self.settings.sampling == "seeded":
            return super().sample(round_)
        test = self.settings.test_seed
        seeded = None if test is None else random.Random(derive_seed(test, "sample", round_))
        return self._drawn(seeded or random.SystemRandom())

    def spent(self, round_: int) -> str | None:
        """Return why there cannot be this round, if it would exceed the budget."""
        s = self.settings
        if s.epsilon is None:
            return None
        taken = self._taken.copy()
        if s.sampling == "seeded":
            taken.update(member.client for member in self.sample(round_))
        if self.epsilon(taken, self._rounds + 1) <= s.epsilon:
            return None
        spent = self.epsilon(self._taken, self._rounds)
        return (
            f": ε is {spent:.3g} (δ {s.delta:g}), and one round more would pass the budget "
            f"privacy.epsilon = {s.epsilon:g}."
        )

    def configure(
        self, round_: int, parameters: Mapping[str, Tensor], grid: Grid, without: Collection[str]
    ) -> list[Message]:
        """Sample among all clients: one that may not be asked counts as one that failed.

        Where clients add the noise themselves every answer is out with it, whether or not the round
        is finished: what is asked of them is written down first.
        """
        asked = [member for member in self.sample(round_) if member.client not in without]
        self._asked = [member.client for member in asked]
        messages = self._messages(round_, parameters, grid, asked)
        self._norm = self._clip_norm
        if self._written_first:
            self._taken.update(self._asked)
            self._asked = []
            write_json(self._folder / ASKED, dict(sorted(self._taken.items())))
        return messages

    @property
    def _written_first(self) -> bool:
        return self.settings.noise == "client" and self.settings.test_seed is None

    def limits(self, offers: Sequence[Offer], failures: Failures, what: str) -> list[Offer]:
        """Return the offers that may be averaged; a client's own change alone decides.

        A limit that depends on the other clients' changes would reveal something of them.
        """
        kept = []
        for offer in offers:
            if self.settings.clip_on == "server" and offer.norm == 0:
                failures.leave_out(
                    offer.client, f"client {offer.client} in {what} changed nothing."
                )
            elif self.settings.clip_on == "client" and offer.norm > self._bound(offer):
                failures.leave_out(
                    offer.client,
                    f"client {offer.client} in {what} did not clip its change: its norm is "
                    f"{offer.norm:.3g}, the clip norm {self._norm:.3g}.",
                )
            else:
                kept.append(offer)
        return kept

    def _bound(self, offer: Offer) -> float:
        noise = 0.0
        if self.settings.noise == "client":  # six standard deviations above its mean norm
            noise = self.settings.noise_multiplier * (math.sqrt(offer.size) + 6)
        return self._norm * (1 + ROUNDING + noise)

    def aggregate(
        self, round_: int, offers: Sequence[Offer]
    ) -> tuple[ArrayRecord | None, dict[str, Any]]:
        """Return the noised mean of this round, all weights the same; it is accounted for."""
        weigh(offers, 0.0, alike=True)
        replies = [offer.message for offer in offers]
        with noise_from(self.settings.test_seed, "server", round_), _flower_quiet():
            arrays, _ = self.strategy.aggregate_train(round_, replies)
        self._taken.update(self._asked)
        self._rounds += 1
        spent = self.epsilon(self._taken, self._rounds)
        return arrays, {"epsilon": spent, "delta": self.settings.delta, "clip-norm": self._norm}

    # ── account ─────────────────────────────────────────────────────────────────────────────────

    def epsilon(self, taken: Mapping[str, int], rounds: int) -> float:
        """Return ε of so many rounds, in which the clients took part so many times."""
        s, population = self.settings, len(self.members)
        secret = s.sampling == "secret"
        relation, sampling = (
            (NeighboringRelation.REPLACE_ONE, SamplingMethod.WITHOUT_REPLACEMENT)
            if secret
            else (NeighboringRelation.ADD_OR_REMOVE_ONE, SamplingMethod.NO_AMPLIFICATION)
        )
        try:
            from flwr.serverapp import RdpAccountant

            accountant = RdpAccountant(PrivacyConfig(s.delta, population, relation, sampling))
        except ImportError as error:
            raise UserError(
                'privacy needs dp-accounting: pip install "fedp2eft[privacy]".'
            ) from error
        times = rounds if secret else max(taken.values(), default=0)
        if not times and not self._label_answers:
            return 0.0
        z = s.noise_multiplier / 2 if secret else s.noise_multiplier
        if times:
            accountant.compose(GaussianPrivacyEvent(z, self.size, population), times)
        if self._label_answers:  # asked of all clients (`learn_label_prior`): no sampling hides one
            accountant.compose(GaussianPrivacyEvent(z, population, population), self._label_answers)
        return accountant.get_epsilon(s.delta)

    @property
    def _clip_norm(self) -> float:
        return float(getattr(self.strategy, "clipping_norm", self.settings.clip_norm))

    def memory(self) -> dict[str, Tensor]:
        """Return what is needed to resume after this round, by name."""
        kept = {TAKEN + name: torch.tensor(times) for name, times in sorted(self._taken.items())}
        norm = torch.tensor(self._clip_norm, dtype=torch.float64)
        return {**kept, NORM: norm, ROUNDS: torch.tensor(self._rounds)}

    def remember(self, kept: Mapping[str, Tensor]) -> None:
        """Resume from there."""
        self._taken = Counter(
            {n.removeprefix(TAKEN): int(v) for n, v in kept.items() if n.startswith(TAKEN)}
        )
        self._rounds = int(kept.get(ROUNDS, torch.tensor(0)))
        if NORM in kept and hasattr(self.strategy, "clipping_norm"):
            self.strategy.clipping_norm = float(kept[NORM])
        asked = read_json(self._folder / ASKED)
        if self._written_first and asked:
            self._taken |= Counter(asked)  # the larger of the two, client by client


@contextmanager
def _flower_quiet() -> Iterator[None]:
    """Silence Flower's warning that clients failed: they are handled here."""
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
