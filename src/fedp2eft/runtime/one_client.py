"""One client that meets a trained PSG, with no federation around it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from fedp2eft.bases import LocalWork
from fedp2eft.data.clients import ClientData
from fedp2eft.generator import PSG
from fedp2eft.models.sources import hash_weights
from fedp2eft.runtime.workspace import Workspace
from fedp2eft.seeding import derive_seed
from fedp2eft.settings.experiment import (
    Budget,
    EvaluationSettings,
    FederationSettings,
    LocalSettings,
    ModelSettings,
    Settings,
)


class OneClient(Workspace):
    """The workspace of a client that a PSG's federation never met.

    Args:
        psg: The trained PSG; it brings the settings that it was trained under.
        model: Folder or hub id of the base model that it was trained with.
        rows: The client, and its training rows.
        held: The same client, and its test rows.
        local: How it trains.
        precision: dtype of the frozen base model, or "auto".
        device: Where the model runs.
        seed: Seed of mini-batches and dropout.
        budget: What a budget of r counts.

    Raises:
        UserError: The PSG was made for another base model.
    """

    def __init__(
        self,
        psg: PSG,
        model: str | Path,
        rows: ClientData,
        held: ClientData,
        local: LocalSettings,
        *,
        precision: Literal["auto", "fp32", "bf16"],
        device: str,
        seed: int,
        budget: Budget = "ranks",
    ) -> None:
        c = psg.config
        super().__init__(
            Settings(
                seed=seed,
                model=ModelSettings(str(model), task=c.task, precision=precision, device=device),
                base=c.base,
                adapter=c.adapter,
                generator=c.generator,
                local=local,
                federation=FederationSettings(profile=c.profile),
                evaluation=EvaluationSettings(ranks=[], budget=budget),  # r is the caller's to say
            )
        )
        self.psg = psg
        self.data = rows
        self._held = held
        if c.label_prior:
            self.know_label_prior(c.label_prior)
        revision = hash_weights(Path(self.source.path))
        c.check_fits(replace(c, base_revision=revision))  # before the model is loaded

    def for_client(self, name: str) -> None:
        """Put the client's own part in place; check that the PSG was made for these layers."""
        self.psg.config.check_fits(self.psg_config)
        super().for_client(name)

    def seed_of(self, purpose: str, name: str) -> int:
        """Return the client's seed of one piece of work, whatever its file is called."""
        return derive_seed(self.settings.seed, purpose)

    def local_work(self, name: str, seed: int) -> LocalWork:
        """Return the client's local run on the base, which its name seeds, too."""
        return replace(super().local_work(name, seed), client=f"seed {self.settings.seed}")

    def texts_and_answers(self, name: str, split: str) -> tuple[list[Sequence[Any]], Sequence[Any]]:
        """Return the client's rows; the test rows may come from a file of their own."""
        if split == "train":
            return super().texts_and_answers(name, split)
        return self._held.texts_and_answers(self._held.clients[0].test, self.settings.model.task)
