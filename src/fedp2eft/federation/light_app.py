"""The ClientApp of a node: it imports what its message takes, as Flower starts a process for each.

Three of the four messages of a secure sum need no model. They are answered without torch,
transformers and PEFT, whose imports take longer than the answer.
"""

from __future__ import annotations

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedp2eft.federation.client.mods import end_with_supernode, send_errors
from fedp2eft.federation.client.sums import serve_sums
from fedp2eft.federation.wire.keys import KEYS, SHARES, UNMASK


class LightApp(ClientApp):
    """Answers the messages around a secure sum itself; all others go to the whole app."""

    def __call__(self, message: Message, context: Context) -> Message:
        """Return the reply to a message."""
        if message.metadata.message_type in (KEYS, SHARES, UNMASK):
            return super().__call__(message, context)
        from fedp2eft.federation.client_app import app as whole

        return whole(message, context)


app = LightApp(mods=[end_with_supernode, send_errors])
serve_sums(app)
