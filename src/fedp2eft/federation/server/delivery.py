"""Sends the finished base to SuperNodes that have no part in the server's run folder.

What travels is what travelled in every round of it: all weights for full fine-tuning, A and B for
LoRA, nothing where the base is used as it is. A SuperNode makes the same model of it as the server
did, and keeps it; it is asked once for each base.
"""

from __future__ import annotations

from pathlib import Path

from flwr.app import ConfigRecord, Message, RecordDict

from fedp2eft.errors import UserError, require, shortened
from fedp2eft.federation.server.checkpoints import load_checkpoint
from fedp2eft.federation.server.exchange import Member, read_replies
from fedp2eft.federation.server.session import Session
from fedp2eft.federation.wire import messages as wire
from fedp2eft.models.sources import hash_weights

AT_ONCE = 16


def deliver_base(session: Session) -> None:
    """Have every client keep the base; those that keep it already are not asked.

    Raises:
        UserError: The base's parameters are not in the run folder any more, too few clients can
            take it, or the first that cannot, where a failure ends the run.
    """
    s, run, workspace, members = session.settings, session.run, session.workspace, session.members
    found = load_checkpoint(run.path / "checkpoints", "base")
    trained = s.base.rounds and workspace.base.travelling(workspace.trainable_base, s.base)
    workspace.release_trainable_base()
    if trained and (found is None or found.round != s.base.rounds):
        raise UserError(
            f"{run.path} has no complete checkpoint of the base model's last round: name another "
            "run folder."
        )
    arrays = wire.to_arrays(found.parameters if trained and found else {})
    model = hash_weights(Path(workspace.source.path))
    wanted = wire.base_id(wire.array_digest(arrays), model)
    missing = [member for member in members if member.base != wanted]
    if not missing:
        return
    failures, reporter = session.failures(), session.reporter

    def check(member: Member, reply: Message) -> None:
        kept = str(reply.content.config_records.get(wire.ABOUT, ConfigRecord()).get("base", ""))
        require(kept == wanted, f"it keeps {shortened(kept)}, not {wanted}.")

    what = "taking the base"
    reporter.start("deliver", len(missing), 0)
    taken = 0
    # A few at a time: the base of a large model on its way to all at once would fill every link.
    for first in range(0, len(missing), AT_ONCE):
        some = {member.node: member for member in missing[first : first + AT_ONCE]}
        content = RecordDict({wire.ARRAYS: arrays, wire.CONFIG: ConfigRecord({"model": model})})
        messages = [Message(content, node, wire.TAKE_BASE) for node in some]
        timeout = s.federation.timeout
        for member, _ in read_replies(session.grid, messages, some, timeout, what, check, failures):
            taken += 1
            reporter.advance("deliver", member.client)
    failures.check(len(members) - len(missing) + taken, len(members), what)
