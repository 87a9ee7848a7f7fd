"""What a personalization method is: a function from one client and a rank budget to an adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from fedp2eft.adapters.btlora import BTLora
from fedp2eft.adapters.weights import AdapterWeights
from fedp2eft.client import Fitted, local_order, personalize
from fedp2eft.generator import PSG
from fedp2eft.settings import LocalSettings
from fedp2eft.tasks.classification import Classification, Scores
from fedp2eft.tasks.encoded import Encoded


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
        shared: The numbers that the method's own federation trained, by name.
        prepared: What the method's survey of the seen clients gave.
    """

    bt: BTLora
    task: Classification
    train: Encoded
    test: Encoded
    psg: PSG
    features: Callable[[], Tensor]
    settings: LocalSettings
    seed: int
    progress: Callable[[float], None] | None = None
    shared: Mapping[str, Tensor] = field(default_factory=dict)
    prepared: Mapping[str, Tensor] = field(default_factory=dict)

    def score(self, model: nn.Module) -> Scores:
        """Scores of a model on the client's test rows; of no rows where there are none."""
        if not len(self.test):
            return Scores(0, 0, 0.0)
        return self.task.score(model, self.test, self.settings.eval_batch_size)

    def fit(self, lam: Tensor, keep: Tensor, settings: LocalSettings | None = None) -> Outcome:
        """Fine-tune the kept ranks with λ frozen, and score the result.

        Args:
            lam: λ, L × r_max.
            keep: Kept ranks, boolean L × r_max.
            settings: In place of the experiment's own.
        """
        settings = settings or self.settings
        epochs = settings.personalize_epochs
        size = settings.batch_size
        order = list(local_order(len(self.train), epochs, size, self.seed))
        done = 0

        def on_step(_loss: float) -> None:
            nonlocal done
            done += settings.accumulate
            if self.progress:
                self.progress(min(1.0, done / max(1, len(order))))

        scores: list[Scores] = []
        fitted: Fitted = personalize(
            self.bt,
            self.task,
            self.train,
            lam,
            keep,
            order,
            settings,
            seed=self.seed,
            on_step=on_step,
            measure=lambda model: scores.append(self.score(model)),
        )
        return Outcome(scores[0], fitted.weights)


@dataclass(frozen=True)
class Outcome:
    """A client's scores with a method, and its adapter where the method makes one."""

    scores: Scores
    weights: AdapterWeights | None


@dataclass(frozen=True)
class Survey:
    """A question that the server asks every seen client once, before the method is used.

    For controls: what some of them ask for (λ, label counts) no deployment should let out.

    Args:
        ask: What one client answers: tensors by name, of the same names and shapes for all clients.
        combine: All answers, in the order of the clients' names, to what every client is then told.
    """

    ask: Callable[[ClientSide, int], dict[str, Tensor]]
    combine: Callable[[Sequence[dict[str, Tensor]]], dict[str, Tensor]]


@dataclass(frozen=True)
class Method:
    """A personalization method.

    Args:
        fit: One client's scores and adapter at a rank budget.
        shared: Which federation trains the numbers that it starts from, if any.
        ranked: Whether the rank budget changes anything.
        survey: What the server must ask the seen clients first, if anything.
        variant: Settings (section → key → value) that its federation must be trained under.
    """

    fit: Callable[[ClientSide, int], Outcome]
    shared: Literal["psg", "fedl2p"] | None = None
    ranked: bool = True
    survey: Survey | None = None
    variant: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
