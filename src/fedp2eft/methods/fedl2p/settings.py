"""Settings of the baseline FedL2P."""

from __future__ import annotations

from dataclasses import dataclass

from fedp2eft.errors import check_bounds, require
from fedp2eft.settings.experiment import Settings


@dataclass(frozen=True)
class FedL2PSettings:
    """The baseline FedL2P (NeurIPS 2023); its federation runs where `evaluation.methods` names it.

    Args:
        rounds: Most federated rounds of the meta-net; it samples as many clients as the PSG's.
        patience: Rounds without a new lowest validation loss after which it stops.
        rank: Rank of the LoRA that it is trained with; the meta-net serves every rank budget.
        hidden: Width of the meta-net's two hidden layers.
        steps: Outer steps of a client in each round, each after an inner fine-tuning of its own.
        validation: Share of a client's training rows that the outer loss holds out.
        hyper_lr: Step of the Neumann series.
        terms: Terms of the Neumann series.
        meta_lr: Learning rate of the meta-net.
        lr_lr: Learning rate of its learnable learning rates.
        init_lr: Where the learnable learning rates start.
        seed: Seed of the meta-net's first weights.
    """

    rounds: int = 150
    patience: int = 50
    rank: int = 8
    hidden: int = 100
    steps: int = 3
    validation: float = 0.2
    hyper_lr: float = 0.1
    terms: int = 3
    meta_lr: float = 1e-4
    lr_lr: float = 1e-6
    init_lr: float = 1e-4
    seed: int = 0

    def __post_init__(self) -> None:
        bounds = {
            "0 or more": "rounds",
            "1 or more": "patience rank hidden steps terms",
            "above 0": "hyper_lr meta_lr lr_lr init_lr",
            "between 0 and 1": "validation",
        }
        check_bounds("fedl2p", self, bounds)

    def check(self, settings: Settings) -> None:
        """Raise `UserError` where the rank is more than the adapter has."""
        r_max = settings.adapter.r_max
        require(
            "fedl2p" not in settings.evaluation.methods or self.rank <= r_max,
            f"fedl2p.rank is {self.rank}; give at most adapter.r_max = {r_max}.",
        )
