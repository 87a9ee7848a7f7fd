"""What a personalization method sees, one client, and what it gives: scores and an adapter."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from numpy.typing import NDArray
from torch import Tensor, nn

from fedp2eft.adapters.btlora import BTLora
from fedp2eft.adapters.weights import AdapterWeights
from fedp2eft.client.descent import OnStep, local_order
from fedp2eft.client.training import Fitted, personalize
from fedp2eft.data.partition import local_validation_split, rng_for
from fedp2eft.errors import UserError, require
from fedp2eft.generator import PSG
from fedp2eft.progress import each_of
from fedp2eft.settings.experiment import LocalSettings
from fedp2eft.tasks.encoded import Encoded
from fedp2eft.tasks.label_prior import adjusted, calibrated, with_classes
from fedp2eft.tasks.task import Scores, Task


@dataclass(frozen=True)
class ClientSide:
    """All that a method may look at: one client's rows and the shared frozen model.

    Args:
        bt: The shared adapter.
        task: Batches, loss and scores.
        train: The client's training rows.
        test: The client's test rows.
        psg: The trained PSG, for methods whose `shared` is "psg".
        features: Gives ξ, computed when it is first asked for.
        settings: Local training.
        seed: Seed of this client's mini-batch order, the same for every method and budget.
        progress: Called with the share of the client's steps that are done.
        shared: The parameters that the method's own phase trained, by name.
        prepared: What the method's surveys of the seen clients gave so far.
        label_prior: q, the label distribution that the base was trained on, C; None if nothing in
            the run needs it.
        own: The method's own section of the settings, of the class `Method.settings`.
        costs: Parameters of a rank of each layer, L, if budgets are in parameters; None if they are
            in ranks.
        answer: Has a model answer the prompts of the test rows, keeps the texts, and gives the sums
            of their scores; None where nothing is to be generated.
    """

    bt: BTLora
    task: Task
    train: Encoded
    test: Encoded
    psg: PSG
    features: Callable[[], Tensor]
    settings: LocalSettings
    seed: int
    progress: Callable[[float], None] | None = None
    shared: Mapping[str, Tensor] = field(default_factory=dict)
    prepared: Mapping[str, Tensor] = field(default_factory=dict)
    label_prior: Tensor | None = None
    own: Any = None
    costs: Sequence[int] | None = None
    answer: Callable[[nn.Module], Mapping[str, float]] | None = None

    def carrying(self, weights: AdapterWeights) -> AdapterWeights:
        """Return the adapter with the client's label prior, if its logits have one added.

        An adapter that has an offset already keeps it.
        """
        if self.task.offset is None or weights.offset is not None:
            return weights
        return replace(weights, offset=self.task.offset, temperature=self.task.temperature)

    @property
    def q(self) -> Tensor:
        """The label distribution that the base was trained on; `UserError` if it is not known."""
        if self.label_prior is None:
            raise UserError("The label prior of the seen clients is not known here.")
        return self.label_prior

    def plain(self) -> ClientSide:
        """Return the client without a label prior on its logits."""
        return replace(self, task=replace(self.task, offset=None, temperature=1.0))

    def calibrated(self, logits: Tensor | None = None) -> ClientSide:
        """Return the client with its calibrated label prior on its logits.

        Args:
            logits: What the base gives for the training rows, N × C; default: one forward pass.

        Raises:
            UserError: The task has no classes.
        """
        side = self.plain()
        if logits is None:
            logits = side.base_logits()
        return replace(side, task=calibrated(side.task, logits, side.train, side.q))

    def base_logits(self) -> Tensor:
        """Return what the base gives for the training rows, N × C.

        Raises:
            UserError: The task has no classes.
        """
        task = with_classes(self.task, "The calibrated label prior")
        if not len(self.train):
            return self.q.new_zeros(0, len(self.q))
        with self.bt.off():
            return task.logits(self.bt.model, self.train, self.settings.eval_batch_size)

    def score(self, model: nn.Module) -> Scores:
        """Return a model's scores on the client's test rows; of no rows if there are none."""
        if not len(self.test):
            return self.task.unscored()
        scores = self.task.score(model, self.test, self.settings.eval_batch_size)
        return replace(scores, texts=self.answer(model)) if self.answer else scores

    def order(self, settings: LocalSettings) -> list[NDArray]:  # type: ignore[type-arg]
        """Return mini-batches of this client's fine-tuning."""
        epochs, size = settings.personalize_epochs, settings.batch_size
        return list(local_order(len(self.train), epochs, size, self.seed))

    def each_of(self, batches: int) -> OnStep:
        """Return a callback that reports each optimizer step over so many mini-batches."""
        return each_of(math.ceil(batches / self.settings.accumulate), self.progress)

    def part(self, number: int, parts: int) -> ClientSide:
        """Return this client in one of several parts of its work, counted from 0."""
        report = self.progress
        if report is None:
            return self
        return replace(self, progress=lambda share: report((number + share) / parts))

    def trial(self, share: float) -> ClientSide:
        """Return this client with a share of its train rows, held out by label, as its test rows.

        The rows held out depend on the client's seed and the share alone: every method and budget
        is tried on the same ones. One row or none cannot be divided and leaves no test rows.
        """
        data = self.train
        kept, held = local_validation_split(data.labels, share, rng_for(self.seed, "held-out rows"))
        train, task = data.select(kept), self.task
        if task.offset is not None:  # held-out labels must not be in it
            task = adjusted(task, train, self.q)
        return replace(self, train=train, test=data.select(held), task=task, answer=None)

    def fit(
        self,
        lam: Tensor,
        keep: Tensor,
        settings: LocalSettings | None = None,
        rates: Tensor | None = None,
        order: Sequence[NDArray] | None = None,  # type: ignore[type-arg]
        after: Callable[[int, nn.Module], None] | None = None,
    ) -> Outcome:
        """Fine-tune the kept ranks with λ frozen, and score the result.

        Args:
            lam: λ, L × r_max.
            keep: Kept ranks, boolean L × r_max.
            settings: In place of the experiment's own.
            rates: Learning rates of A and of B of each layer, L × 2, in place of a common one.
            order: Mini-batches of row indices, in place of the client's own.
            after: Called after every optimizer step with its number, from 1, and the model.
        """
        settings = settings or self.settings
        order = self.order(settings) if order is None else order
        scores: list[Scores] = []
        report, taken = self.each_of(len(order)), 0

        def on_step(loss: float) -> None:
            nonlocal taken
            taken += 1
            report(loss)
            if after:
                after(taken, self.bt.model)

        fitted: Fitted = personalize(
            self.bt,
            self.task,
            self.train,
            lam,
            keep,
            order,
            settings,
            rates=rates,
            seed=self.seed,
            on_step=on_step,
            measure=lambda model: scores.append(self.score(model)),
        )
        return Outcome(scores[0], fitted.weights)


def check_size(client: ClientSide, weights: AdapterWeights, rank: int) -> None:
    """Raise `UserError` if an adapter is larger than a budget in parameters."""
    if client.costs is None or not rank:
        return
    size, most = sum(x.A.numel() + x.B.numel() for x in weights.layers), rank * sum(client.costs)
    require(
        size <= most,
        f"The method made an adapter of {size:,} parameters; r = {rank} allows {most:,} under "
        "evaluation.budget: parameters. Set it to ranks, or leave the method out.",
    )


@dataclass(frozen=True)
class Outcome:
    """A client's scores with a method, and its adapter where the method makes one.

    Args:
        scores: On the client's test rows.
        weights: The adapter.
        choice: What a method that chooses has chosen for this client, a word.
    """

    scores: Scores
    weights: AdapterWeights | None
    choice: str = ""
