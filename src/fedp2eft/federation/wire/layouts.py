"""What the secure sums of a run hold: a round's parameters and metrics, label counts, answers."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import numpy as np

from fedp2eft.client.phase import Phase
from fedp2eft.errors import UserError
from fedp2eft.federation.wire.sums import Block, Layout, Noise
from fedp2eft.methods import Survey
from fedp2eft.settings.peers import PrivacySettings

if TYPE_CHECKING:
    from torch import Tensor

WEIGHT, CAPPED, METRICS = "#weight", "#capped", "#metrics"  # no parameter's name has a "#" in it
LARGEST_METRIC = 2.0**20
LARGEST_COUNT = 2.0**31
LABELS = "labels"


@dataclass(frozen=True)
class Part:
    """One client's part of a sum.

    Args:
        values: What is summed, by name.
        cut: Entries that were cut before.
        noise_key: 32 bytes that noise is drawn from.
    """

    values: Mapping[str, Any]
    cut: int = 0
    noise_key: bytes = b""


def noise_key(settings: PrivacySettings, *parts: int | str) -> bytes:
    """Return what a client's noise is drawn from: nobody else knows it, but in a test."""
    if settings.test_seed is None:
        return secrets.token_bytes(32)
    return sha256(repr((settings.test_seed, *parts)).encode()).digest()


# ── a round of a phase ──────────────────────────────────────────────────────────────────────────


def phase_noise(phase: Phase, settings: PrivacySettings, clients: int) -> Noise | None:
    """Return the noise in a round's sum; None if there is no noise."""
    if not (phase.private and settings.on):
        return None
    s = settings
    return Noise(s.clip_norm, s.noise_multiplier, clients, s.secure_bits)


def phase_layout(
    phase: Phase, shapes: Mapping[str, Tensor], settings: PrivacySettings, clients: int
) -> Layout:
    """Return how a round is summed.

    Args:
        phase: Whose round.
        shapes: Tensors of the shapes of its parameters, by name.
        settings: Of privacy.
        clients: How many are asked.
    """
    s, noise = settings, phase_noise(phase, settings, clients)
    most = 1 if noise else s.secure_max_examples

    def block(shape: tuple[int, ...]) -> Block:
        return noise.block(shape) if noise else Block(shape, most * s.secure_clip, s.secure_bits)

    return {name: block(tuple(value.shape)) for name, value in shapes.items()} | {
        WEIGHT: Block((1,), float(most)),
        CAPPED: Block((1,), 1.0),
        METRICS: Block((len(phase.metrics),), most * LARGEST_METRIC),
    }


def phase_part(
    phase: Phase,
    sent: Mapping[str, Tensor],
    trained: Mapping[str, Tensor],
    metrics: Mapping[str, float],
    examples: int,
    settings: PrivacySettings,
    key: bytes = b"",
) -> Part:
    """Return a client's part of a round: N, and N times the change of every parameter and metric.

    With differential privacy every weight is 1, and the change is clipped to the norm C.

    Args:
        phase: Whose round.
        sent: The parameters that the client started from.
        trained: What it came to.
        metrics: Of `phase.metrics`.
        examples: N.
        settings: Of privacy.
        key: 32 bytes that noise is drawn from.
    """
    s, private, cut = settings, phase.private and settings.on, 0
    weight = 1 if private else min(examples, s.secure_max_examples)
    change = {
        name: value.detach().double().cpu().numpy() - sent[name].double().numpy()
        for name, value in trained.items()
    }
    if private:
        norm = float(np.sqrt(sum((value**2).sum() for value in change.values())))
        change = {
            n: value * min(1.0, s.clip_norm / max(norm, 1e-30)) for n, value in change.items()
        }
    else:
        cut = sum(int((np.abs(value) > s.secure_clip).sum()) for value in change.values())
        change = {n: value.clip(-s.secure_clip, s.secure_clip) for n, value in change.items()}
    values: dict[str, Any] = {name: weight * value for name, value in change.items()}
    values[WEIGHT] = [weight]
    values[CAPPED] = [not private and examples > weight]
    values[METRICS] = weight * np.array([metrics[name] for name in phase.metrics], np.float64)
    return Part(values, cut, key)


# ── label counts ────────────────────────────────────────────────────────────────────────────────


def labels_noise(settings: PrivacySettings, clients: int) -> Noise | None:
    """Return the noise in the sum of label frequencies, whose norm is at most 1."""
    return Noise(1.0, settings.noise_multiplier, clients, 64) if settings.on else None


def labels_layout(classes: int, settings: PrivacySettings, clients: int) -> Layout:
    """Return how label counts, or with differential privacy label frequencies, are summed."""
    noise = labels_noise(settings, clients)
    return {LABELS: noise.block((classes,)) if noise else Block((classes,), LARGEST_COUNT)}


# ── surveys ─────────────────────────────────────────────────────────────────────────────────────


def survey_layout(survey: Survey, shapes: Mapping[str, Sequence[int]]) -> Layout:
    """Return how answers of these shapes are summed."""
    if not shapes:
        raise UserError("it answers nothing")
    limits = {name: survey.limits.get(name, survey.limit) for name in shapes}
    return {name: Block(tuple(shape), limits[name]) for name, shape in shapes.items()}
