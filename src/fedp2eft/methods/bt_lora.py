"""BT-LoRA: every client learns λ by itself, without a federation (paper section 5, baselines)."""

from __future__ import annotations

from fedp2eft.client.descent import local_order
from fedp2eft.client.side import ClientSide, Outcome
from fedp2eft.client.training import cut_to, stage1
from fedp2eft.seeding import derive_seed
from fedp2eft.settings.profiles import PROFILES


def bt_lora(client: ClientSide, rank: int) -> Outcome:
    """Run stage 1 from λ = generator.init_lambda for `local.epochs`, then personalize with λ^s.

    The adapter of stage 1 is thrown away, as in a round of FedP²EFT.
    """
    bt, settings, config = client.bt, client.settings, client.psg.config
    seed = derive_seed("stage 1", client.seed)
    order = list(local_order(len(client.train), settings.epochs, settings.batch_size, seed))
    learning, fitting = client.part(0, 2), client.part(1, 2)
    bt.reset(config.generator.init_lambda)
    stage1(
        bt, client.task, client.train, order, settings, PROFILES[config.profile],
        seed=seed, on_step=learning.each_of(len(order)),
    )  # fmt: skip
    return fitting.fit(*cut_to(rank, bt.rank_lambda().cpu(), bt.settings.r_max, client.costs))
