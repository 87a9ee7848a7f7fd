"""The `local` engine: Flower's Grid in this process.

The same ServerApp and ClientApp that Flower runs on many machines run here one message at a time,
with one base model in memory for all clients. A message runs when its reply is pulled, so a caller
sees every reply as soon as it exists. With a `ManyAtOnce` the app is shown the messages that wait
behind it first, and may train their clients in one batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict
from flwr.app.user_config import UserConfig
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from fedp2eft.errors import UserError
from fedp2eft.federation.hooks import CLIENT_APP_RAISED, SERVER_NODE_ID, begin_run, give_id

_LOCAL: ContextVar[bool] = ContextVar("a client of this engine is at work", default=False)


def is_local() -> bool:
    """Return whether the client at work runs in the server's own process."""
    return _LOCAL.get()


@dataclass(frozen=True)
class ManyAtOnce:
    """Lets a ClientApp work for several clients at once, before their messages run.

    Args:
        kind: The message type that it is for.
        size: At most this many clients.
        compute: Gets the messages and their contexts, and keeps what it finds for the app.
    """

    kind: str
    size: int
    compute: Callable[[Sequence[Message], Sequence[Context]], None]


class LocalGrid(Grid):
    """Runs a ClientApp for any number of nodes, one message after the other.

    Args:
        app: The ClientApp.
        nodes: One node config per client, e.g. `{"client": "fr-seen-00"}`.
        run_config: The run's config, the same for all nodes.
        cohort: How the app trains several clients at once; None for one at a time.
    """

    def __init__(
        self,
        app: ClientApp,
        nodes: list[UserConfig],
        run_config: UserConfig,
        cohort: ManyAtOnce | None = None,
    ) -> None:
        self._app = app
        self._cohort = cohort
        self._ahead: set[str] = set()
        self._run_config = run_config
        self._nodes = {SERVER_NODE_ID + 1 + i: config for i, config in enumerate(nodes)}
        self._state: dict[int, RecordDict] = {}
        self._waiting: dict[str, Message] = {}
        self._run = begin_run()

    def set_run(self, run: Run) -> None:
        """Set the run that messages belong to."""
        self._run = begin_run(run)

    @property
    def run(self) -> Run:
        """The run that messages belong to."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return a message from the server to one node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """Return the ids of all nodes."""
        return list(self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Take messages in; returns their ids. They run when they are pulled."""
        ids = []
        for message in messages:
            if message.metadata.dst_node_id not in self._nodes:
                raise ValueError(f"There is no node {message.metadata.dst_node_id}.")
            message_id = str(uuid4())
            give_id(message, message_id)
            self._waiting[message_id] = message
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Run the first of the named messages that still waits, and return its reply."""
        for message_id in message_ids:
            message = self._waiting.pop(message_id, None)
            if message is not None:
                return [self._run_client(message)]
        return []

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Push messages and collect the replies that exist before the timeout (seconds)."""
        ids = self.push_messages(messages)
        end = None if timeout is None else time.monotonic() + timeout
        replies = []
        for message_id in ids:
            if end is not None and time.monotonic() > end:
                self._waiting.pop(message_id, None)
                continue
            replies.extend(self.pull_messages([message_id]))
        return replies

    def _look_ahead(self, message: Message) -> None:
        """Show the app a cohort: this message and the next ones of its kind that wait."""
        cohort, kind = self._cohort, message.metadata.message_type
        if cohort is None or kind != cohort.kind or message.metadata.message_id in self._ahead:
            return
        waiting = [m for m in self._waiting.values() if m.metadata.message_type == kind]
        together = [message, *waiting[: cohort.size - 1]]
        self._ahead = {m.metadata.message_id for m in together}
        if len(together) > 1:
            cohort.compute(together, [self._context(m) for m in together])

    def _context(self, message: Message) -> Context:
        node = message.metadata.dst_node_id
        # A node's state stays empty unless its app puts something there, so none is made for it.
        state = self._state.get(node) or RecordDict()
        return Context(self._run.run_id, node, self._nodes[node], state, self._run_config)

    def _run_client(self, message: Message) -> Message:
        self._look_ahead(message)
        node, context = message.metadata.dst_node_id, self._context(message)
        token = _LOCAL.set(True)
        try:
            reply = self._app(message, context)
        except UserError as error:
            return Message(Error(CLIENT_APP_RAISED, str(error)), reply_to=message)
        finally:
            _LOCAL.reset(token)
        if len(context.state):
            self._state[node] = context.state
        return reply
