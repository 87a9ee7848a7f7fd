"""Several waiting clients of one round, trained in one batch before their messages run.

The local engine shows its ClientApp which messages wait. What is computed for them here is taken by
the usual handler of each message, so replies, their order and their errors are those of one client
at a time; where a cohort cannot be, the handlers find nothing and compute as ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from flwr.app import Message

from fedp2eft.adapters.stacked import NotPerRowError
from fedp2eft.client.cohort import CohortClient, train_cohort, why_alone
from fedp2eft.client.phase import Trained, Turn
from fedp2eft.errors import UserError
from fedp2eft.federation.wire.messages import the_arrays
from fedp2eft.progress import current
from fedp2eft.runtime.phases import psg_order, psg_trained

if TYPE_CHECKING:
    from fedp2eft.runtime.workspace import Workspace


class LookAhead:
    """Rounds that were computed before their messages run, by message id."""

    def __init__(self) -> None:
        self._found: dict[str, Trained | UserError] = {}
        self._alone: str | None = None
        self._most: int | None = None

    def take(self, message: Message) -> Trained | None:
        """Return what was computed for this message, once; None if nothing was.

        Raises:
            UserError: The client's loss was not finite.
        """
        found = self._found.pop(message.metadata.message_id, None)
        if isinstance(found, UserError):
            raise found
        return found

    def train(
        self, workspace: Workspace, messages: Sequence[Message], turns: Sequence[Turn]
    ) -> None:
        """Train the clients of several `train.psg` messages of one round as a cohort.

        Where their number is too much for the GPU's memory, half of it is tried, and remembered.

        Args:
            workspace: Serves them all.
            messages: With the same φ; one with another is left to its handler.
            turns: Their clients'.
        """
        self._found = {}
        self._look_for_obstacle(workspace)
        if self._alone:
            return
        workspace.psg.set_phi(turns[0].parameters)
        arrays = the_arrays(messages[0])
        ready: list[tuple[str, CohortClient]] = []
        for message, turn in zip(messages, turns, strict=True):
            try:
                data = workspace.encoded(turn.client, "train")
                xi, own = workspace.features(turn.client), workspace.task_of(turn.client)
                client = CohortClient(data, xi, psg_order(turn), own)
            except UserError:
                continue  # its own handler reports it
            if the_arrays(message) == arrays:
                ready.append((message.metadata.message_id, client))
        while len(ready) > 1 and self._most != 1 and not self._alone:
            part = ready[: self._most]
            try:
                found = self._rounds(workspace, [client for _, client in part])
            except NotPerRowError as error:
                self._stay_alone(f"layer {error} mixes the rows of a batch")
            except torch.OutOfMemoryError:
                self._most = max(1, len(part) // 2)
            else:
                self._found |= zip([key for key, _ in part], found, strict=True)
                ready = ready[len(part) :]
            if self._most and workspace.device.type == "cuda":
                torch.cuda.empty_cache()

    def _rounds(
        self, workspace: Workspace, clients: Sequence[CohortClient]
    ) -> list[Trained | UserError]:
        s, reporter = workspace.settings, current()
        longest = max(len(client.order) for client in clients)
        steps, done = max(1, -(-longest // s.local.accumulate)), 0

        def on_step(_losses: list[float]) -> None:
            nonlocal done
            done += 1
            reporter.part("psg", done / steps, f"{len(clients)} clients")

        found = train_cohort(
            workspace.bt, workspace.task, clients, workspace.psg,
            s.local, s.generator, workspace.profile, on_step=on_step,
        )  # fmt: skip
        return [each if isinstance(each, UserError) else psg_trained(each) for each in found]

    def _look_for_obstacle(self, workspace: Workspace) -> None:
        if self._alone is not None:
            return
        if workspace.base.private:
            kind = workspace.settings.base.kind
            self._stay_alone(f"each has a part of the base of its own (base.kind: {kind})")
        elif reason := why_alone(workspace.bt, workspace.settings.local):
            self._stay_alone(reason)

    def _stay_alone(self, reason: str) -> None:
        self._alone = reason
        current().note(f"Clients train one at a time (federation.cohort): {reason}.")
