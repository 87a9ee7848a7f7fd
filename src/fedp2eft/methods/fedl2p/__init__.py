"""FedL2P's phase: FedAvg of the meta-net over the seen clients.

The last round's parameters are taken: each round's validation loss is that of other clients, so the
round where it was lowest says more of who was sampled than of the meta-net.
"""

from __future__ import annotations

from fedp2eft.client.phase import VALIDATION_LOSS, Phase, lazy

PHASE = Phase(
    "fedl2p",
    "FedL2P",
    rounds="fedl2p.rounds",
    clients="federation.clients_per_round",
    metrics=("loss", VALIDATION_LOSS),
    first=lazy("fedp2eft.methods.fedl2p.method:first"),
    train=lazy("fedp2eft.methods.fedl2p.method:train_turn"),
    patience="fedl2p.patience",
)
