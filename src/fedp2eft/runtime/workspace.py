"""What one process holds for all its clients: one base model, and caches of tokens and ξ.

A process of the local engine serves every client from one workspace; a SuperNode has one for its
only client. Nothing in here is ever sent.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedp2eft.adapters.btlora import BTLora
from fedp2eft.adapters.head import check_head, head_of, with_head
from fedp2eft.adapters.weights import AdapterWeights
from fedp2eft.bases import BASES, BaseTraining, LocalWork, copy_parameters
from fedp2eft.client.phase import Phase
from fedp2eft.client.side import ClientSide
from fedp2eft.client.training import features
from fedp2eft.data.nodes import Value as NodeValue
from fedp2eft.errors import ShareableError, UserError
from fedp2eft.generator import PSG, PSGConfig
from fedp2eft.methods import Method
from fedp2eft.models.fit import longest_input
from fedp2eft.models.loading import as_loaded, declares_head, load_base, load_config, save_model
from fedp2eft.models.precision import resolve_precision
from fedp2eft.models.sources import HASHED, ModelSource, hash_weights
from fedp2eft.modes import has_dropout
from fedp2eft.progress import current
from fedp2eft.runtime.client_rows import ClientRows
from fedp2eft.runtime.own_base import PrivateParts
from fedp2eft.seeding import derive_seed
from fedp2eft.settings.experiment import Settings
from fedp2eft.settings.profiles import PROFILES, Profile
from fedp2eft.tasks.generation import check_room
from fedp2eft.tasks.label_prior import label_counts, offset

logger = logging.getLogger(__name__)


class Workspace(ClientRows):
    """Loads on first use, once.

    Args:
        settings: The experiment.
        run: The run folder, where this process has it, or a SuperNode's own folder: the base model
            is taken from there, and adapters are kept there.
        node: The node config of a SuperNode that reads its own client's file.

    Attributes:
        private: Each client's own part of the base; never sent.
    """

    def __init__(
        self,
        settings: Settings,
        run: Path | None = None,
        node: Mapping[str, NodeValue] | None = None,
    ) -> None:
        super().__init__(settings, run, node)
        self._features: dict[str, Tensor] = {}
        self._shapes: dict[str, dict[str, Tensor]] = {}
        self.private = PrivateParts(
            self.client_folder,
            settings.federation.keep_checkpoints,
            self.base,
            lambda: self.finished_base,
            lambda name: self.local_work(name, self.seed_of("local base", name)),
        )
        self._frozen: dict[str, nn.Parameter] = {}

    @property
    def client_folder(self) -> Path | None:
        """Where clients keep what never leaves them, if this process has a folder."""
        return self.run / "clients" if self.run else None

    @cached_property
    def profile(self) -> Profile:
        """`paper` or `reference`."""
        return PROFILES[self.settings.federation.profile]

    def local_work(self, name: str, seed: int) -> LocalWork:
        """Return a client's local run on the base."""
        dtype = resolve_precision(self.settings.model.precision, self.device)
        data = self.encoded(name, "train")
        task = self.task_of(name, self.settings.base.logit_adjustment)
        return LocalWork(name, task, data, self.settings, dtype, seed)

    # ── the base model ──────────────────────────────────────────────────────────────────────────

    @property
    def base(self) -> BaseTraining:
        """How the base is trained."""
        return BASES[self.settings.base.kind]

    @cached_property
    def trainable_base(self) -> nn.Module:
        """The base in fp32 with a fresh head, for training the base itself."""
        return self._load_trainable(self.source)

    def save_base(
        self, parameters: Mapping[str, Tensor], facts: Mapping[str, Any] | None = None
    ) -> None:
        """Make the run's own base of what its rounds ended with, and write it to `run / "base"`.

        Args:
            parameters: What travels of the base, trained; empty where nothing was.
            facts: JSON values to put beside it, by name of the file.
        """
        assert self.run is not None
        model = self.trainable_base
        if parameters:
            copy_parameters(self.base.travelling(model, self.settings.base), parameters)
        save_model(self.run / "base", self.base.merged(model), as_loaded(self.tokenizer), facts)
        self.release_trainable_base()

    def release_trainable_base(self) -> None:
        """Let the trained base go; the next use loads it anew."""
        self.__dict__.pop("trainable_base", None)

    @cached_property
    def finished_base(self) -> nn.Module:
        """The run's own base in fp32, for training what a client adds to it for itself."""
        return self._load_trainable(self.base_source)

    def _load_trainable(self, source: ModelSource) -> nn.Module:
        model = self._load(source, seed=self.settings.model.seed)
        untrained = self.settings.base.kind == "none" and not declares_head(load_config(source))
        if untrained and self.settings.model.task == "classification":
            logger.warning(
                "%s has no trained classification head and base.kind is none: all adapters sit on "
                "a head of random weights.", source.name,
            )  # fmt: skip
        return self.base.wrap(model, self.settings)

    def _load(self, source: ModelSource, **options: Any) -> nn.Module:
        s = self.settings
        model: nn.Module = load_base(
            source,
            s.model.task,
            labels=self.labels,
            tokenizer=self.tokenizer,
            device=self.device,
            max_length=s.local.max_length,
            gradient_checkpointing=s.model.gradient_checkpointing,
            **options,
        )
        if s.model.gradient_checkpointing and not s.local.dropout and has_dropout(model):
            raise UserError(
                "Gradient checkpointing needs training mode, in which this base model uses "
                "dropout: set local.dropout to true, or model.gradient_checkpointing to false."
            )
        return model

    @cached_property
    def base_source(self) -> ModelSource:
        """The base model that adapters sit on: the run's own."""
        if self.run is None:
            return self.source
        folder = self.run / "base"
        if self.node is not None and not folder.is_dir():
            raise ShareableError("It has not received the run's base model: start the run again.")
        return ModelSource(str(folder), str(folder), hash_weights(folder))

    @cached_property
    def bt(self) -> BTLora:
        """The frozen base with its gated adapter."""
        self.release_trainable_base()
        dtype = resolve_precision(self.settings.model.precision, self.device)
        base = self._load(self.base_source, dtype=dtype, quantize=self.settings.model.quantize)
        if self.settings.evaluation.generate:
            new_tokens = self.settings.evaluation.max_new_tokens
            check_room(longest_input(base), self.settings.local.max_length, new_tokens)
        self._frozen = dict(base.named_parameters())
        clamp = self.profile.clamp_forward
        bt = BTLora(base, self.settings.adapter, clamp_forward=clamp)
        if self.settings.local.logit_adjustment != "none":
            check_head(bt, len(self.labels))  # now, not after hours of training
        return bt

    @property
    def costs(self) -> list[int] | None:
        """Parameters of a rank of each layer if budgets are in parameters, else None."""
        return self.bt.costs if self.settings.evaluation.budget == "parameters" else None

    @property
    def has_head(self) -> bool:
        """Whether an adapter can carry a label prior."""
        return head_of(self.bt.linears, len(self.labels)) is not None

    def for_client(self, name: str) -> None:
        """Put a client's own part of the base, if there is one, into `bt`'s base.

        To be called before any work of a client with `bt`.
        """
        if self.base.private:
            _ = self.bt
            self.private.put(self._frozen, name)

    def carried(self, name: str, weights: AdapterWeights) -> AdapterWeights:
        """Return a client's adapter as one for the common base: all that it needs is inside."""
        return self.private.carried(name, with_head(weights, self.bt))

    # ── the PSG ─────────────────────────────────────────────────────────────────────────────────

    @cached_property
    def psg_config(self) -> PSGConfig:
        """The config of this experiment's PSG."""
        revision = self.base_source.revision  # of the run's own base, a hash of its weights
        if not revision.startswith(HASHED):
            revision = hash_weights(Path(self.base_source.path))
        s = self.settings
        return PSGConfig(
            base_model=self.source.name,
            base_revision=revision,
            linear_names=tuple(name for name, _ in self.bt.linears),
            layer_names=self.bt.names,
            feature_kind=self.profile.feature_kind,
            profile=self.profile.name,
            task=s.model.task,
            labels=self.labels,
            text_columns=self.data.text_columns,
            label_column=self.data.label_column or "label",
            target_column=(self.data.target_column or "") if not self.labels else "",
            adapter=s.adapter,
            generator=s.generator,
            local=s.local,
            base=s.base,
        )

    @cached_property
    def psg(self) -> PSG:
        """A PSG to load φ into; every use sets all of φ first."""
        return PSG(self.psg_config)

    # ── ξ ───────────────────────────────────────────────────────────────────────────────────────

    def features(self, name: str) -> Tensor:
        """Return ξ of a client as the PSG wants it, computed once."""
        if name not in self._features:
            self.for_client(name)
            data, g = self.encoded(name, "train"), self.settings.generator
            rows, task = data, self.task
            if g.feature_tokens != "all":
                rows = data.sample(g.feature_tokens, derive_seed("feature rows", g.seed))
            if rows is not data:  # its states would be of no further use
                task = replace(task, states_mib=0)
            xi = features(self.bt, task, rows, self.settings.local, self.profile)
            own = None
            if g.label_features:
                q = self.q
                own = offset(label_counts(data, len(q)), q)
            self._features[name] = self.psg.features_of(xi, len(data), own)
        return self._features[name]

    def shapes(self, phase: Phase) -> dict[str, Tensor]:
        """Return names and shapes of a phase's parameters; the tensors take no memory."""
        if phase.name not in self._shapes:
            first = phase.first(self).items()
            self._shapes[phase.name] = {n: torch.empty_like(v, device="meta") for n, v in first}
        return self._shapes[phase.name]

    # ── a client ────────────────────────────────────────────────────────────────────────────────

    def side(
        self, name: str, phase: str = "personalize", method: Method | None = None
    ) -> ClientSide:
        """Return a client as methods see it.

        Args:
            name: The client.
            phase: What its progress is reported under.
            method: Whose own section of the settings it has.
        """
        self.for_client(name)
        reporter = current()
        return ClientSide(
            bt=self.bt,
            task=self.task_of(name),
            train=self.encoded(name, "train"),
            test=self.encoded(name, "test"),
            psg=self.psg,
            features=lambda: self.features(name),
            settings=self.settings.local,
            seed=self.seed_of("personalize", name),
            label_prior=self.label_prior,
            progress=lambda share: reporter.part(phase, share, name),
            own=self.settings.section(method.settings) if method and method.settings else None,
            costs=self.costs,
        )
