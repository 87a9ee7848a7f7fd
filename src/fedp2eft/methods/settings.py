"""Settings of the methods that have few: sections `adalora` and `tuning`."""

from __future__ import annotations

from dataclasses import dataclass, field

from fedp2eft.errors import check_bounds, require


@dataclass(frozen=True)
class AdaLoraSettings:
    """The AdaLoRA baseline (paper section 5); epochs, batches and clip are those of `local`.

    Args:
        lr: Learning rate of P, E and Q.
        orth: Weight of the orthogonality penalty.
        tinit: Share of the steps before the first rank is dropped.
        tfinal: Share of the steps after the last rank is dropped.
        init_multiple: Ranks that every layer starts with, as a multiple of the budget.
    """

    lr: float = 1e-3
    orth: float = 0.1
    tinit: float = 0.1
    tfinal: float = 0.3
    init_multiple: float = 1.5

    def __post_init__(self) -> None:
        bounds = {"0 or more": "orth", "1 or more": "init_multiple", "above 0": "lr"}
        check_bounds("adalora", self, bounds)
        require(
            self.tinit >= 0 and self.tfinal >= 0 and self.tinit + self.tfinal < 1,
            "adalora.tinit and adalora.tfinal are shares of the steps: together below 1.",
        )


@dataclass(frozen=True)
class TuningSettings:
    """What the tuned controls choose from, on held-out training rows of the seen clients.

    Args:
        lrs: Learning rates in place of local.personalize_lr.
        scales: Factors on λ.
        taus: Strengths τ of the label-prior correction.
        holdout: Share of a seen client's training rows that is held out.
    """

    lrs: list[float] = field(default_factory=lambda: [1e-4, 3e-4, 1e-3, 3e-3, 1e-2])
    scales: list[float] = field(default_factory=lambda: [1.0])
    taus: list[float] = field(default_factory=lambda: [0.25 * n for n in range(1, 9)])
    holdout: float = 0.25

    def __post_init__(self) -> None:
        for name in ("lrs", "scales", "taus"):
            values = getattr(self, name)
            require(
                bool(values) and min(values) > 0,
                f"tuning.{name} is {values}; give at least one number, all above 0.",
            )
        check_bounds("tuning", self, {"between 0 and 1": "holdout"})
