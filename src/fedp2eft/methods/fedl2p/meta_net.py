"""FedL2P's meta-net: from a client's features ξ to a learning rate for every A and every B.

    ξ (2M) → Linear → ReLU → Linear → ReLU → Linear → clamp to [0, 1000] → (2L) ⊙ lr = rates (L × 2)

lr is a learnable learning rate for each of the 2L outputs, and hidden layers are 100 wide. Weights
start Xavier-normal with gain 0.1, biases at 1, lr at 1e-4.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedp2eft.adapters.gates import clamp_straight_through
from fedp2eft.seeding import derive_seed

GAIN, BIAS = 0.1, 1.0
LARGEST = 1000.0


class MetaNet(nn.Module):
    """The network whose parameters are all that travels in FedL2P.

    Args:
        features: Entries of ξ.
        hidden: Width of both hidden layers.
        matrices: Outputs, 2L: one for every A and one for every B.
        init_lr: Where the learnable learning rates start.
        seed: Seed of the first weights.

    Attributes:
        lr: The learnable learning rates, 2L.
    """

    def __init__(
        self, features: int, hidden: int, matrices: int, init_lr: float = 1e-4, seed: int = 0
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):  # first draws that are replaced below
            self.layers = nn.ModuleList(
                [
                    nn.Linear(features, hidden),
                    nn.Linear(hidden, hidden),
                    nn.Linear(hidden, matrices),
                ]
            )
        self.lr = nn.Parameter(torch.full((matrices,), init_lr))
        generator = torch.Generator().manual_seed(derive_seed("meta-net", seed))
        for layer in self.layers:
            nn.init.xavier_normal_(layer.weight, gain=GAIN, generator=generator)  # type: ignore[arg-type]
            nn.init.constant_(layer.bias, BIAS)  # type: ignore[arg-type]

    @classmethod
    def of(cls, eta: Mapping[str, Tensor]) -> MetaNet:
        """Return the meta-net whose parameters these are."""
        hidden, features = eta["layers.0.weight"].shape
        net = cls(features, hidden, len(eta["lr"]))
        net.load_state_dict(eta)
        return net

    def forward(self, features: Tensor) -> Tensor:
        """Return learning rates from ξ.

        Args:
            features: ξ.

        Returns:
            L × 2, of A and of B of each adapted layer, none below 0. Clamping passes gradients
            straight through, so that a rate may come back from 0.
        """
        first, second, last = self.layers
        outputs = last(second(first(features).relu()).relu())
        # Adam may push an lr below 0, where it would be a step uphill
        rates: Tensor = _clamped(outputs) * _clamped(self.lr)
        return rates.reshape(-1, 2)

    def eta(self) -> dict[str, Tensor]:
        """Return parameter name → float32 tensor, detached copies."""
        return {name: value.detach().clone() for name, value in self.state_dict().items()}


def _clamped(values: Tensor) -> Tensor:
    return clamp_straight_through(values, 0.0, LARGEST)
