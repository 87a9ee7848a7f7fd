"""A client's part of a secure sum (SecAgg+, Bell et al. 2020): four answers, then it forgets.

    keys     its two public keys
    shares   shares of its seed and of its mask key, each encrypted for one neighbor
    (the question itself) its values, quantized and masked: by its seed, and with every neighbor
    unmask   shares of the seeds of those whose values arrived, and of the keys of those that
             dropped out: of no client both

What it must remember from one message to the next is in the node's state, which Flower keeps on the
node. It answers only the next message of its sum, and each of them once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedp2eft.errors import ShareableError
from fedp2eft.federation.wire.keys import (
    FEWEST,
    SECURE,
    Shares,
    agreed,
    mask_key,
    new_key,
    new_seed,
    proof,
    split,
    threshold,
)
from fedp2eft.federation.wire.layouts import Part
from fedp2eft.federation.wire.messages import ARRAYS
from fedp2eft.federation.wire.sums import CUT, Layout, add_mask, counting_cuts
from fedp2eft.settings.peers import PrivacySettings
from fedp2eft.settings.reading import settings_of_run

Record = Mapping[str, Any]


def serve_sums(app: ClientApp) -> None:
    """Answer the messages around the questions whose answers are summed."""

    def settings(context: Context) -> PrivacySettings:
        return settings_of_run(context.run_config).privacy

    @app.query("secure_keys")
    def keys(message: Message, context: Context) -> Message:
        return give_keys(message, context, settings(context))

    @app.query("secure_shares")
    def shares(message: Message, context: Context) -> Message:
        return give_shares(message, context, settings(context))

    @app.query("secure_unmask")
    def reveal(message: Message, context: Context) -> Message:
        return unmask(message, context, settings(context))


def give_keys(message: Message, context: Context, settings: PrivacySettings) -> Message:
    """Begin a sum: answer new public keys; any sum before is forgotten."""
    asked = _record(message)
    if not settings.secure:
        raise ShareableError("The server begins a secure sum, and privacy.secure_sums is off.")
    clients, index = int(asked["clients"]), int(asked["index"])
    if clients < FEWEST or not 0 <= index < clients:
        raise ShareableError(f"A sum over {clients} clients hides nobody: {FEWEST} or more.")
    (mask_secret, mask_public), (box_secret, box_public) = new_key(), new_key()
    _keep(
        context,
        {
            "stage": "keys",
            "session": str(asked["session"]),
            "clients": clients,
            "index": index,
            "mask-secret": mask_secret,
            "box-secret": box_secret,
        },
    )
    return _answer(message, {"mask-key": mask_public, "box-key": box_public})


def give_shares(message: Message, context: Context, settings: PrivacySettings) -> Message:
    """Answer shares of the seed and the mask key, each encrypted for one neighbor."""
    asked, state = _record(message), _state(message, context, "keys")
    session, own = state["session"], state["index"]
    peers = [int(peer) for peer in asked.get("peers", [])]
    keys = {"mask": list(asked.get("mask-keys", [])), "box": list(asked.get("box-keys", []))}
    least = threshold(settings, state["clients"])
    others = set(peers) - {own}
    if len(others) != len(peers) or not others <= set(range(state["clients"])):
        raise ShareableError("The server names neighbors that cannot be.")
    if any(len(set(found)) != len(peers) for found in keys.values()):
        raise ShareableError("The server names the same public key for two neighbors.")
    if len(peers) + 1 < least:
        raise ShareableError(f"{len(peers)} neighbors are left, and a sum takes {least - 1}.")
    seed, holders = new_seed(), [own, *peers]
    parts = zip(
        split(seed, least, len(holders)),
        split(state["mask-secret"], least, len(holders)),
        strict=True,
    )
    mine, *theirs = [Shares(*pair) for pair in parts]
    box_keys = [agreed(state["box-secret"], public) for public in keys["box"]]
    boxes = [
        shares.boxed(key, session, own, peer)
        for shares, key, peer in zip(theirs, box_keys, peers, strict=True)
    ]
    proofs = [
        shares.proofs(session, own, holder)
        for shares, holder in zip([mine, *theirs], holders, strict=True)
    ]
    _keep(
        context,
        state
        | {
            "stage": "shares",
            "seed": seed,
            "peers": peers,
            "mask-keys": keys["mask"],
            "open-keys": box_keys,
            "own-shares": [mine.seed, mine.key],
        },
    )
    answer = {"to": peers, "boxes": boxes, "proofs": proofs}
    return _answer(message, answer | {"seed": proof("seed", session, own, own, seed)})


def give_masked(
    message: Message,
    context: Context,
    settings: PrivacySettings,
    part: Part,
    layout_of: Callable[[int], Layout],
) -> Message:
    """Answer a question with masked values: only their sum over clients can be read.

    Args:
        message: The question; it holds the neighbors' encrypted shares.
        context: The node's.
        settings: Of privacy.
        part: What is to be summed.
        layout_of: How, by the same names, over a given number of clients.

    Raises:
        ShareableError: The server asks outside of a sum, or too few neighbors are left.
    """
    asked, state = _record(message), _state(message, context, "shares")
    session, own, clients = state["session"], state["index"], state["clients"]
    places = {peer: place for place, peer in enumerate(state["peers"])}
    given = (asked.get(name, []) for name in ("from", "boxes", "proofs"))
    there = {peer: (box, proofs) for peer, box, proofs in zip(*given, strict=True)}
    least = threshold(settings, clients)
    if not set(there) <= set(places):
        raise ShareableError("The server names neighbors that cannot be.")
    if len(there) + 1 < least:
        raise ShareableError(f"{len(there)} neighbors are left, and a sum takes {least - 1}.")
    # 1. Read what the neighbors entrust. A box that is not what its owner proves is reported; the
    #    owner's mask stays in the sum, for others may hold good shares of it.
    held: dict[int, Shares] = {own: Shares(*state["own-shares"])}
    for peer, (box, proofs) in there.items():
        key = state["open-keys"][places[peer]]
        shares = Shares.opened(box, key, session, peer, own)
        if shares is not None and shares.proofs(session, peer, own) == proofs:
            held[peer] = shares
    # 2. Quantize and mask: the own mask, and one with each neighbor that cancels in the sum.
    arrays, cut = {}, part.cut
    for name, block in layout_of(clients).items():
        stream = mask_key(name, part.noise_key)  # each array has noise of its own
        arrays[name], over = block.encode(part.values[name], clients, stream)
        cut += over
    arrays[CUT], _ = counting_cuts({})[CUT].encode([cut], clients)
    add_mask(arrays, mask_key(session, state["seed"]), 1)
    for peer in there:
        common = agreed(state["mask-secret"], state["mask-keys"][places[peer]])
        add_mask(arrays, mask_key(session, common), 1 if own > peer else -1)
    _keep(
        context,
        {
            "stage": "masked",
            "session": session,
            "clients": clients,
            "index": own,
            "neighbors": sorted(there),
            "of": list(held),
            "seed-shares": [shares.seed for shares in held.values()],
            "key-shares": [shares.key for shares in held.values()],
        },
    )
    unreadable = sorted(set(there) - set(held))
    content = {
        ARRAYS: ArrayRecord({name: Array(array) for name, array in arrays.items()}),
        SECURE: ConfigRecord({"session": session, "unreadable": unreadable}),
    }
    return Message(RecordDict(content), reply_to=message)  # type: ignore[arg-type]


def unmask(message: Message, context: Context, settings: PrivacySettings) -> Message:
    """Answer shares of seeds and of mask keys, and forget the sum: it is asked once.

    Raises:
        ShareableError: The server asks for both secrets of a client, or with too few clients left.
    """
    asked, state = _record(message), _state(message, context, "masked")
    del context.state[SECURE]
    alive, dropped = ([int(i) for i in asked.get(name, [])] for name in ("alive", "dropped"))
    known, least = {*state["neighbors"], state["index"]}, threshold(settings, state["clients"])
    both = alive + dropped
    if len(set(both)) != len(both) or set(both) != known or state["index"] not in alive:
        raise ShareableError("The server asks for shares that would give a client away.")
    if len(alive) < least:
        raise ShareableError(f"{len(alive)} clients are left, and unmasking takes {least}.")
    held = {
        owner: Shares(seed, key)
        for owner, seed, key in zip(
            state["of"], state["seed-shares"], state["key-shares"], strict=True
        )
    }
    nothing = Shares(b"", b"")
    return _answer(
        message,
        {
            "seeds": [held.get(owner, nothing).seed for owner in alive],
            "keys": [held.get(owner, nothing).key for owner in dropped],
        },
    )


# ── records ─────────────────────────────────────────────────────────────────────────────────────


def _record(message: Message) -> Record:
    found = message.content.config_records.get(SECURE)
    if found is None:
        raise ShareableError(
            "privacy.secure_sums is on, and the server asks for what only leaves in a sum."
        )
    return found


def _state(message: Message, context: Context, stage: str) -> dict[str, Any]:
    """Return the state of the sum that a message belongs to, if that message is the next one."""
    kept = context.state.config_records.get(SECURE, ConfigRecord())
    if kept.get("stage") != stage or kept["session"] != _record(message).get("session"):
        raise ShareableError("This message is not the next one of a secure sum of this client.")
    return dict(kept)


def _keep(context: Context, state: Record) -> None:
    context.state[SECURE] = ConfigRecord(dict(state))


def _answer(message: Message, answer: Record) -> Message:
    session = _record(message)["session"]
    record = ConfigRecord({"session": session, **answer})
    return Message(RecordDict({SECURE: record}), reply_to=message)
