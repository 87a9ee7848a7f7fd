"""Settings that protect a federation: against faulty or hostile peers, and for privacy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedp2eft.errors import check_bounds, require

Aggregator = Literal[
    "fedavg",
    "fedmedian",
    "trimmed-mean",
    "krum",
    "multi-krum",
    "fedavgm",
    "fedadagrad",
    "fedadam",
    "fedyogi",
]


@dataclass(frozen=True)
class PeerSettings:
    """Checks of the clients' replies, and what happens if a client fails.

    Args:
        failures: "continue" logs and counts a client that fails or sends an unusable reply, and
            continues with the rest. "stop" ends the run with the client's error. "auto" is "stop"
            if all clients run in this process, where the mistake is yours, else "continue".
        min_share: Minimum share of a round's clients whose replies must be usable.
        quarantine: Failures in a row after which a client is not asked again until the run is
            restarted; 0 for no limit.
        max_norm: Leave out a client whose change of the parameters has a norm above this multiple
            of its round's median; 0 for no limit. Honest clients share one learning rate, so their
            changes differ by little more than their numbers of steps.
        max_examples: Cap a client's number of examples, its weight in the average, at this multiple
            of its round's median; 0 for no limit.
    """

    failures: Literal["auto", "stop", "continue"] = "auto"
    min_share: float = 0.5
    quarantine: int = 3
    max_norm: float = 10.0
    max_examples: float = 10.0

    def __post_init__(self) -> None:
        require(
            0 < self.min_share <= 1,
            f"peers.min_share is {self.min_share}; give a share above 0 and up to 1.",
        )
        bounds = {"0 or more": "quarantine"}
        bounds |= {"1 or more, or 0 for no limit": "max_norm max_examples"}
        check_bounds("peers", self, bounds)


@dataclass(frozen=True)
class AggregationSettings:
    """How the server averages the clients' parameters (Flower's strategies).

    Args:
        kind: "fedavg" is the mean weighted by examples, as in the paper. "fedmedian" and
            "trimmed-mean" (per parameter), "krum" and "multi-krum" (per client) are robust to
            hostile clients and weigh all clients equally, except multi-krum. The other kinds are
            server optimizers for the PSG; the base model is then averaged.
        hostile: Maximum share of hostile clients per round: trimmed-mean cuts this share off at
            either end, and Krum assumes it.
        server_lr: Learning rate of a server optimizer. Default: 1 for fedavgm, 1e-3 for the others,
            as far as ten local steps at a learning rate of 1e-4.
        momentum: Momentum of fedavgm.
        beta1: Decay of the first moment (fedadam, fedyogi).
        beta2: Decay of the second moment (fedadam, fedyogi).
        tau: Added to the root of the second moment (fedadagrad, fedadam, fedyogi).
    """

    kind: Aggregator = "fedavg"
    hostile: float = 0.2
    server_lr: float | None = None
    momentum: float = 0.9
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def __post_init__(self) -> None:
        require(
            0 <= self.hostile < 0.5,
            f"aggregation.hostile is {self.hostile}; give a share from 0 up to below 0.5.",
        )
        bounds = {"above 0": "server_lr tau", "at least 0 and below 1": "momentum beta1 beta2"}
        check_bounds("aggregation", self, bounds)


ROBUST = ("fedmedian", "trimmed-mean", "krum", "multi-krum")
"""Aggregators that compare the clients' replies."""


@dataclass(frozen=True)
class PrivacySettings:
    """What the server may see: differential privacy of φ, and secure sums (docs/privacy.md).

    Both are off by default.

    Args:
        clipping: "off"; "fixed" clips every client's change of φ to norm clip_norm; "adaptive"
            adapts that norm so that a given share of clients stays below it (Andrew et al. 2021).
        clip_on: Where changes are clipped. With "client", no larger change leaves the client.
        noise: Who adds Gaussian noise. "server": once, to the average; the server sees every
            client's change. "client": every client, to its own change before sending it; the same
            noise on the average then takes many more clients. Needs fixed clipping on the client.
            With secure_sums, "client" is a share of the noise: together the clients of a round add
            as much as the server would, and nobody is trusted with it.
        noise_multiplier: Standard deviation of the noise, as a multiple of the clip norm.
        lambda_max: Upper bound of λ and λ̂ under noise, in place of a higher adapter.lambda_max:
            noise in φ makes λ̂ large, and with it the steps of every adapter.
        clip_norm: Clip norm; with adaptive clipping, its initial value.
        quantile: Share of clients that adaptive clipping keeps below the norm.
        clip_lr: Learning rate of adaptive clipping.
        delta: δ at which ε is reported; choose it below one over the number of seen clients.
        epsilon: Privacy budget: training ends before the round that would exceed it. null for no
            limit.
        sampling: "seeded": draw clients from the experiment's seed; anyone may know who took part,
            and ε is that of the client that took part most often. "secret": draw them from the
            system's randomness; ε relies on nobody knowing the sample.
        test_seed: Draw noise and secret samples from this seed. Anyone who knows it can subtract
            the noise, so there is no privacy: for tests only.
        secure_sums: "on": secure aggregation (SecAgg+, Bell et al. 2020). The server receives the
            parameters of every training phase, the metrics of a round and the answers to its
            surveys as sums over clients, and never one client's. Excludes whatever compares
            clients.
        secure_neighbors: Clients that each client shares masks and shares of its secrets with; all
            of them if there are fewer. An even number.
        secure_threshold: Share of a client's neighbors, itself included, that must answer until
            the end of a sum. Fewer can neither finish it nor, colluding, unmask the client.
        secure_clip: Cut every entry of a client's change of the parameters to at most this
            magnitude; a round's metrics count the entries cut. Not used with differential privacy,
            where clip_norm is the limit.
        secure_bits: Bits of the modulus in which parameters are summed, 32 or 64. The quantization
            step follows from it, so that no sum overflows; 64 bits take twice the bytes of fp32.
        secure_max_examples: Cap on a client's number of examples, its weight in a sum.
    """

    clipping: Literal["off", "fixed", "adaptive"] = "off"
    clip_on: Literal["server", "client"] = "server"
    noise: Literal["server", "client"] = "server"
    noise_multiplier: float = 1.0
    lambda_max: float = 10.0
    clip_norm: float = 0.1
    quantile: float = 0.5
    clip_lr: float = 0.2
    delta: float = 1e-5
    epsilon: float | None = None
    sampling: Literal["seeded", "secret"] = "seeded"
    test_seed: int | None = None
    secure_sums: Literal["off", "on"] = "off"
    secure_neighbors: int = 32
    secure_threshold: float = 0.6
    secure_clip: float = 1.0
    secure_bits: int = 32
    secure_max_examples: int = 10_000

    def __post_init__(self) -> None:
        bounds = {
            "above 0": "noise_multiplier lambda_max clip_norm clip_lr epsilon secure_clip",
            "1 or more": "secure_max_examples",
            "2 or more": "secure_neighbors",
        }
        check_bounds("privacy", self, bounds | {"between 0 and 1": "quantile delta"})
        require(
            self.secure_neighbors % 2 == 0,
            f"privacy.secure_neighbors is {self.secure_neighbors}; give an even number.",
        )
        require(
            self.secure_bits in (32, 64),
            f"privacy.secure_bits is {self.secure_bits}; give 32 or 64.",
        )
        require(
            0.5 < self.secure_threshold <= 1,
            f"privacy.secure_threshold is {self.secure_threshold}; give a share above 0.5, so that "
            "no two groups of neighbors can unmask one client, and up to 1.",
        )
        if self.noise == "client":
            require(
                self.clipping != "adaptive" and self.clip_on == "client",
                "privacy.noise is client, which needs clipping: fixed and clip_on: client.",
            )
            require(
                self.sampling == "seeded",
                "privacy.noise is client: the server knows which clients it asks, so set "
                "privacy.sampling: seeded.",
            )

    @property
    def on(self) -> bool:
        """Return whether φ is trained with differential privacy."""
        return self.clipping != "off"

    @property
    def secure(self) -> bool:
        """Return whether the server receives sums over clients only."""
        return self.secure_sums == "on"

    def check(self, aggregation: AggregationSettings, peers: PeerSettings, wire: str) -> None:
        """Raise `UserError` if other settings are incompatible with these."""
        if self.secure:
            self._check_secure(aggregation, peers, wire)
        if not self.on:
            return
        require(
            aggregation.kind == "fedavg",
            f"privacy needs aggregation.kind: fedavg, not {aggregation.kind}: ε is only known for "
            "the plain mean.",
        )
        require(
            self.clip_on == "server" or wire == "fp32",
            f"privacy.clip_on is client, which needs federation.wire: fp32, not {wire}.",
        )

    def _check_secure(
        self, aggregation: AggregationSettings, peers: PeerSettings, wire: str
    ) -> None:
        """A server that sees sums alone can compare no clients."""
        require(
            aggregation.kind not in ROBUST,
            f"privacy.secure_sums is on: aggregation.kind: {aggregation.kind} compares the "
            "clients' parameters, which the server does not see; use fedavg or a server optimizer.",
        )
        require(
            peers.max_norm == 0 and peers.max_examples == 0,
            "privacy.secure_sums is on: no client can be compared with its round's median; set "
            "peers.max_norm: 0 and peers.max_examples: 0 (secure_clip and secure_max_examples "
            "limit clients that keep to them).",
        )
        require(
            wire == "fp32",
            f"privacy.secure_sums is on, which needs federation.wire: fp32, not {wire}: parameters "
            "are quantized for the sum (privacy.secure_bits).",
        )
        require(
            not self.on or self.noise == "client",
            "privacy.secure_sums is on: with differential privacy the clients clip and add the "
            "noise; set privacy.clipping: fixed, clip_on: client and noise: client.",
        )
