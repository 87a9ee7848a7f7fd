"""The two ways of running the method: as the paper states it, or as its public code does it."""

from __future__ import annotations

from dataclasses import dataclass

from fedp2eft.settings.experiment import ProfileName


@dataclass(frozen=True)
class Profile:
    """What `paper` and `reference` do differently. Everything else is the same code.

    Args:
        name: "paper" or "reference".
        clamp_forward: The forward pass sees λ clamped (the penalties always do).
        clamp_target: Stage 2 regresses on λ clamped.
        zero_lambda_grad: Gradients of λ are zeroed before every step; else they add up over a
            local run.
        masked_features: ξ leaves padding positions out.
        feature_batch_size: Rows per batch of ξ, inputs padded to the longest allowed length; None
            takes large batches of similar length, padded to their own longest row.
    """

    name: ProfileName
    clamp_forward: bool
    clamp_target: bool
    zero_lambda_grad: bool
    masked_features: bool
    feature_batch_size: int | None

    @property
    def feature_kind(self) -> str:
        """Short name of what ξ averages over; a PSG remembers it."""
        return "masked" if self.masked_features else "padded"


PAPER = Profile("paper", True, True, True, True, None)
REFERENCE = Profile("reference", False, False, False, False, 4)
PROFILES: dict[str, Profile] = {profile.name: profile for profile in (PAPER, REFERENCE)}
