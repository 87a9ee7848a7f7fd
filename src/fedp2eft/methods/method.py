"""What a personalization method is: a function from one client and a rank budget to an adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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
        psg: The trained PSG.
        features: Gives ξ, computed when it is first asked for.
        settings: Local training.
        seed: Seed of this client's mini-batch order, the same for every method and budget.
        progress: Called with the share of the client's steps that are done.
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

    def score(self, model: nn.Module) -> Scores:
        """Scores of a model on the client's test rows; of no rows where there are none."""
        if not len(self.test):
            return Scores(0, 0, 0.0)
        return self.task.score(model, self.test, self.settings.eval_batch_size)

    def fit(self, lam: Tensor, keep: Tensor) -> Outcome:
        """Fine-tune the kept ranks with λ frozen, and score the result."""
        epochs = self.settings.personalize_epochs
        size = self.settings.batch_size
        order = list(local_order(len(self.train), epochs, size, self.seed))
        done = 0

        def on_step(_loss: float) -> None:
            nonlocal done
            done += self.settings.accumulate
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
            self.settings,
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


Method = Callable[[ClientSide, int], Outcome]
