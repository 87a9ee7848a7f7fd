"""Two profiles: the method as in the paper, or as in its public implementation."""

from __future__ import annotations

from dataclasses import dataclass

from fedp2eft.settings.experiment import ProfileName


@dataclass(frozen=True)
class Profile:
    """What differs between `paper` and `reference`. Everything else is the same code.

    Args:
        name: "paper" or "reference".
        clamp_forward: Clamp λ in the forward pass (the penalties always do).
        clamp_target: Clamp the λ that stage 2 regresses on.
        zero_lambda_grad: Zero the gradients of λ before every step; otherwise they accumulate over
            a local run.
        masked_features: Exclude padding positions from ξ.
        feature_batch_size: Rows per batch of ξ, with inputs padded to the maximum length. None uses
            large batches of similar length, padded to their own longest row.
    """

    name: ProfileName
    clamp_forward: bool
    clamp_target: bool
    zero_lambda_grad: bool
    masked_features: bool
    feature_batch_size: int | None

    @property
    def feature_kind(self) -> str:
        """Return what ξ averages over, as the PSG's config stores it."""
        return "masked" if self.masked_features else "padded"


PAPER = Profile("paper", True, True, True, True, None)
REFERENCE = Profile("reference", False, False, False, False, 4)
PROFILES: dict[str, Profile] = {profile.name: profile for profile in (PAPER, REFERENCE)}
