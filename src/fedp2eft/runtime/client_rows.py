"""What one process knows of its clients: their rows as tokens, and the label prior.

Of the model it has the tokenizer and the config, and never the weights.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedp2eft.data.clients import Client, ClientData
from fedp2eft.data.nodes import Value as NodeValue
from fedp2eft.data.nodes import clients_of_node
from fedp2eft.data.registry import load_clients
from fedp2eft.errors import ShareableError
from fedp2eft.files import read_json
from fedp2eft.models.loading import load_config, load_tokenizer
from fedp2eft.models.precision import choose_device
from fedp2eft.models.sources import ModelSource, resolve_model
from fedp2eft.progress import current
from fedp2eft.seeding import derive_seed
from fedp2eft.settings.experiment import LogitAdjustment, Settings
from fedp2eft.tasks.encoded import Encoded
from fedp2eft.tasks.label_prior import adjusted
from fedp2eft.tasks.make import make_task
from fedp2eft.tasks.task import Task
from fedp2eft.tasks.text_scores import check_scorers

logger = logging.getLogger(__name__)
LABEL_PRIOR_FILE = "label-prior.json"
"""In a run folder: q, and where it comes from."""


class ClientRows:
    """Loads on first use, once.

    Args:
        settings: The experiment.
        run: The run folder, where this process has it, or a SuperNode's own folder.
        node: The node config of a SuperNode that reads its own client's file.
    """

    def __init__(
        self,
        settings: Settings,
        run: Path | None = None,
        node: Mapping[str, NodeValue] | None = None,
    ) -> None:
        if settings.evaluation.generate:
            check_scorers()  # now, not after hours of training
        self.settings = settings
        self.run = run
        self.node = node
        self._encoded: dict[tuple[str, str], Encoded] = {}
        self._said_cut = False
        self._label_prior: Tensor | None = None

    @cached_property
    def data(self) -> ClientData:
        """The clients and their rows."""
        if self.node is not None:
            return clients_of_node(self.node, self.settings.data)
        classes = self.settings.model.task == "classification"
        return load_clients(self.settings.data, labels_used=classes)

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
    def task(self) -> Task:
        """How rows become batches, losses and scores."""
        length = self.settings.local.max_length
        config = load_config(self.source)
        made = make_task(self.settings.model.task, self.tokenizer, length, self.device, config)
        return replace(made, states_mib=self.settings.model.states_mib)

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names in the order of their ids; none without classes."""
        return self.data.labels if self.settings.model.task == "classification" else ()

    @cached_property
    def clients(self) -> dict[str, Client]:
        """Clients by name."""
        return {client.name: client for client in self.data.clients}

    def client(self, name: str) -> Client:
        """Return one client; an unknown name is a `UserError`."""
        if name not in self.clients:
            raise ShareableError(f"This process has no client {name!r}.")
        return self.clients[name]

    def texts_and_answers(self, name: str, split: str) -> tuple[list[Sequence[Any]], Sequence[Any]]:
        """Return the text columns of a client's rows ("train" or "test"), and their answers."""
        client = self.client(name)
        indices = client.train if split == "train" else client.test
        return self.data.texts_and_answers(indices, self.settings.model.task)

    def encoded(self, name: str, split: str) -> Encoded:
        """Return a client's rows ("train" or "test") as tokens."""
        key = (name, split)
        if key not in self._encoded:
            rows = self.texts_and_answers(name, split)
            data = self._encoded[key] = self.task.encode(self.tokenizer, *rows)
            if self.settings.model.task == "classification":
                self._say_cut(name, split, data)
            elif data.dropped or data.cut:
                current().note(
                    f"Client {name}, {split}: of {len(rows[1])} rows {data.dropped} left out, "
                    f"whose prompt fills local.max_length, and {data.cut} responses cut there."
                )
        return self._encoded[key]

    def _say_cut(self, name: str, split: str, data: Encoded) -> None:
        """Say once that texts are cut: where they are long, they are so at every client."""
        if data.cut and not self._said_cut:
            self._said_cut = True
            logger.warning(
                "Client %s, %s: %d of %d texts are longer than local.max_length (%d tokens) and "
                "are cut there.%s",
                name, split, data.cut, len(data), self.settings.local.max_length,
                " Other clients' are not listed." if len(self.clients) > 1 else "",
            )  # fmt: skip

    def seed_of(self, purpose: str, name: str) -> int:
        """Return a client's seed of one piece of work."""
        return derive_seed(self.settings.seed, purpose, name)

    # ── the label prior ─────────────────────────────────────────────────────────────────────────

    @property
    def label_prior(self) -> Tensor | None:
        """q, as the server sent it or the run folder has it; None if nothing needs it."""
        if self._label_prior is None and self.run is not None:
            kept = read_json(self.run / LABEL_PRIOR_FILE) or {}
            if "q" in kept:
                self.know_label_prior(kept["q"])
        return self._label_prior

    def know_label_prior(self, q: Sequence[float]) -> None:
        """Use q, the label distribution that the base was trained on.

        Raises:
            UserError: It is not a distribution over the classes.
        """
        known = [float(value) for value in q if isinstance(value, int | float)]
        values = torch.tensor(known)
        whole = abs(float(values.sum()) - 1) < 1e-3 and bool((values > 0).all())
        if not len(known) == len(q) == len(self.labels) or not whole:
            raise ShareableError(
                f"The label prior is not a distribution over {len(self.labels)} classes."
            )
        self._label_prior = values

    def task_of(self, name: str, adjustment: LogitAdjustment | None = None) -> Task:
        """Return the task of a client, with its label prior where the settings say so.

        Args:
            name: The client.
            adjustment: In place of `local.logit_adjustment`.
        """
        if (adjustment or self.settings.local.logit_adjustment) == "none":
            return self.task
        return adjusted(self.task, self.encoded(name, "train"), self.q)

    @property
    def q(self) -> Tensor:
        """`label_prior`; a `UserError` if it is not known."""
        if self.label_prior is None:
            raise ShareableError("The server did not send the label prior of the seen clients.")
        return self.label_prior
