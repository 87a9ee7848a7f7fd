"""What one process holds for all its clients: one base model, and caches of tokens and ξ.

A process of the local engine serves every client from one workspace; a SuperNode has one for its
only client. Nothing in here is ever sent.
"""

from __future__ import annotations

import json
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedp2eft.adapters.btlora import BTLora
from fedp2eft.client import features
from fedp2eft.data.federation import Client, Federation
from fedp2eft.data.settings import load_federation
from fedp2eft.errors import UserError
from fedp2eft.federation.cohort import LookAhead
from fedp2eft.federation.compression import Feedback
from fedp2eft.generator import PSG, PSGConfig
from fedp2eft.models.loading import (
    ModelSource,
    load_base,
    load_tokenizer,
    resolve_model,
)
from fedp2eft.models.precision import resolve_precision
from fedp2eft.models.sources import hash_weights
from fedp2eft.profiles import PROFILES, Profile
from fedp2eft.settings import Settings
from fedp2eft.tasks.classification import Classification
from fedp2eft.tasks.encoded import Encoded


class Workspace:
    """Loads on first use, once.

    Args:
        settings: The experiment.
        run: The run folder, where this process has it: the base model is taken from there, and
            adapters are kept there.

    Attributes:
        ahead: Rounds of several clients that were computed in one batch.
        feedback: What rounding kept back of each client's changes; never sent.
    """

    def __init__(self, settings: Settings, run: Path | None = None) -> None:
        self.settings = settings
        self.run = run
        self._encoded: dict[tuple[str, str], Encoded] = {}
        self._features: dict[str, Tensor] = {}
        self._trainable: nn.Module | None = None
        self.ahead = LookAhead()
        self.feedback = Feedback(run / "clients" if run else None)

    @cached_property
    def profile(self) -> Profile:
        """`paper` or `reference`."""
        return PROFILES[self.settings.federation.profile]

    @cached_property
    def federation(self) -> Federation:
        """The clients and their rows."""
        return load_federation(self.settings.data)

    @cached_property
    def device(self) -> torch.device:
        """Where the model runs."""
        return choose_device(self.settings.model.device)

    @cached_property
    def source(self) -> ModelSource:
        """The untrained base model."""
        return resolve_model(self.settings.model.name, revision=self.settings.model.revision)

    @cached_property
    def tokenizer(self) -> Any:
        """The base model's tokenizer."""
        return load_tokenizer(self.source)

    @cached_property
    def task(self) -> Classification:
        """How rows become batches, losses and scores."""
        pad = self.tokenizer.pad_token_id
        return Classification(
            pad_id=0 if pad is None else int(pad),
            max_length=self.settings.local.max_length,
            device=self.device,
        )

    @cached_property
    def clients(self) -> dict[str, Client]:
        """Clients by name."""
        return {client.name: client for client in self.federation.clients}

    def client(self, name: str) -> Client:
        """One client; an unknown name is a `UserError`."""
        if name not in self.clients:
            raise UserError(f"This process has no client {name!r}.")
        return self.clients[name]

    def encoded(self, name: str, split: str) -> Encoded:
        """A client's rows ("train" or "test") as tokens."""
        key = (name, split)
        if key not in self._encoded:
            client = self.client(name)
            indices = client.train if split == "train" else client.test
            rows = self.federation.rows(indices)
            texts = [rows[column] for column in self.federation.text_columns]
            labels = self.federation.label_ids(indices)
            self._encoded[key] = self.task.encode(self.tokenizer, texts, labels)
        return self._encoded[key]

    # ── the base model ──────────────────────────────────────────────────────────────────────────

    @property
    def trainable_base(self) -> nn.Module:
        """The base in fp32 with a fresh head, for training the base itself."""
        if self._trainable is None:
            self._trainable = load_base(
                self.source,
                self.settings.model.task,
                num_labels=len(self.federation.labels),
                seed=self.settings.model.seed,
                device=self.device,
                max_length=self.settings.local.max_length,
            )
            self._name_labels(self._trainable)
        return self._trainable

    def _name_labels(self, model: nn.Module) -> None:
        labels = self.federation.labels
        model.config.id2label = dict(enumerate(labels))  # type: ignore[union-attr]
        model.config.label2id = {name: i for i, name in enumerate(labels)}  # type: ignore[union-attr]

    @cached_property
    def base_source(self) -> ModelSource:
        """The base model that adapters sit on: the run's own."""
        if self.run is None:
            return self.source
        folder = self.run / "base"
        return ModelSource(str(folder), str(folder), hash_weights(folder))

    @cached_property
    def bt(self) -> BTLora:
        """The frozen base with its gated adapter."""
        self._trainable = None
        base = load_base(
            self.base_source,
            self.settings.model.task,
            num_labels=len(self.federation.labels) or None,
            dtype=resolve_precision(self.settings.model.precision, self.device),
            device=self.device,
            max_length=self.settings.local.max_length,
        )
        clamp = self.profile.clamp_forward
        return BTLora(base, self.settings.adapter, clamp_forward=clamp)

    # ── the PSG ─────────────────────────────────────────────────────────────────────────────────

    @cached_property
    def psg_config(self) -> PSGConfig:
        """The config of this experiment's PSG."""
        return PSGConfig.of(
            self.settings.adapter,
            self.settings.generator,
            base_model=self.source.name,
            base_revision=hash_weights(Path(self.base_source.path)),
            linear_names=tuple(name for name, _ in self.bt.linears),
            layer_names=self.bt.names,
            feature_kind=self.profile.feature_kind,
            profile=self.profile.name,
            max_length=self.settings.local.max_length,
            labels=self.federation.labels,
            text_columns=self.federation.text_columns,
            label_column=self.federation.label_column or "label",
            personalize_lr=self.settings.local.personalize_lr,
            personalize_epochs=self.settings.local.personalize_epochs,
            batch_size=self.settings.local.batch_size,
            dropout=self.settings.local.dropout,
        )

    @cached_property
    def psg(self) -> PSG:
        """A PSG to load φ into; every use sets all of φ first."""
        return PSG(self.psg_config)

    def features(self, name: str) -> Tensor:
        """ξ of a client as the PSG wants it, computed once."""
        if name not in self._features:
            data = self.encoded(name, "train")
            xi = features(self.bt, self.task, data, self.settings.local, self.profile)
            self._features[name] = self.psg.features_of(xi, len(data))
        return self._features[name]


@lru_cache(maxsize=1)
def shared_workspace(settings_json: str, run: str | None) -> Workspace:
    """This process's workspace for an experiment; the one before is let go.

    Args:
        settings_json: The resolved settings as JSON.
        run: The run folder, or None where this process has none.
    """
    from fedp2eft.reading import settings_from

    return Workspace(settings_from(json.loads(settings_json)), Path(run) if run else None)


def choose_device(name: str) -> torch.device:
    """The torch device of a setting: "auto" is the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"Device {name!r} is unknown: use auto, cpu or cuda.") from error
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"Device {name!r} is unknown: use auto, cpu or cuda.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"Device {name} is asked for, but torch sees {torch.cuda.device_count()} GPUs: use "
            "another number, auto or cpu."
        )
    return device
