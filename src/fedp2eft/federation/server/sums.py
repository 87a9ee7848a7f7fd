"""The server's part of a secure sum (SecAgg+, Bell et al. 2020): it learns the sum alone.

    1. keys     every client's public keys, passed on to its neighbors
    2. shares   every client's encrypted shares, passed on to their holders
    3. the question itself: values quantized and masked, added up as they come
    4. unmask   of clients whose values are in, shares of the seed of their own mask; of those that
                dropped out since 2, shares of the key of their masks with neighbors

A client may drop out at any stage, as long as enough of every client's neighbors are left. The
server follows the protocol and is curious; what one that does not could do: docs/privacy.md.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray

from fedp2eft.errors import UserError
from fedp2eft.federation.server.admission import Failures
from fedp2eft.federation.server.exchange import Member, exchange
from fedp2eft.federation.wire.keys import (
    FEWEST,
    KEYS,
    SECURE,
    SHARES,
    UNMASK,
    agreed,
    join,
    mask_key,
    neighbors,
    new_session,
    proof,
    public_of,
    threshold,
    usable,
)
from fedp2eft.federation.wire.messages import content_bytes, read_array, the_arrays
from fedp2eft.federation.wire.sums import CUT, KINDS, Layout, add_mask, counting_cuts
from fedp2eft.settings.peers import PrivacySettings

Shapes = Mapping[str, tuple[int, ...]]
LayoutOf = Callable[[Shapes], Layout]
"""The layout of a reply whose arrays have these shapes; `UserError` if it should have others."""
Record = Mapping[str, Any]
MOST_BOX = 2048


@dataclass(frozen=True)
class Summed:
    """A sum over clients.

    Args:
        values: By name, float64.
        clients: Names of those in it, sorted.
        cut: How many entries the clients cut to their limits.
        bytes_up: From all clients, in all stages.
        bytes_down: To all clients.
    """

    values: dict[str, NDArray[np.float64]]
    clients: list[str]
    cut: int
    bytes_up: int
    bytes_down: int


@dataclass(frozen=True)
class _Dealt:
    """What a client gave for others: boxes and proofs by holder, and the proof of its seed."""

    boxes: dict[int, bytes]
    proofs: dict[int, bytes]
    seed: bytes


def fixed(layout: Layout) -> LayoutOf:
    """Return a layout that every reply must have."""

    def of(shapes: Shapes) -> Layout:
        if dict(shapes) != {name: block.shape for name, block in layout.items()}:
            raise UserError("it has other parameters than expected")
        return layout

    return of


class SecureSum:
    """One sum over clients.

    Args:
        grid: The engine.
        members: The clients, `FEWEST` or more.
        settings: Of privacy.
        timeout: Seconds to wait for the replies of each stage.
        what: What is summed, for errors.
        failures: Receives clients that fail.
        renewed: Every reply renews the time.

    Raises:
        UserError: Too few clients for a sum to hide any.
    """

    def __init__(
        self,
        grid: Grid,
        members: Sequence[Member],
        settings: PrivacySettings,
        timeout: float,
        what: str,
        failures: Failures,
        renewed: bool = False,
    ) -> None:
        if len(members) < FEWEST:
            raise UserError(
                f"{len(members)} clients are asked in {what}, and a secure sum takes {FEWEST} or "
                "more: sample more, or set privacy.secure_sums: off."
            )
        self.clients = len(members)
        self._members = random.SystemRandom().sample(list(members), len(members))
        self._by_node = {member.node: member for member in members}
        self._index = {member.node: i for i, member in enumerate(self._members)}
        self._near = [neighbors(i, settings, self.clients) for i in range(self.clients)]
        self._least = threshold(settings, self.clients)
        self._grid, self._timeout, self._renewed = grid, timeout, renewed
        self._what, self._failures = what, failures
        self._session = new_session()
        self._keys: dict[int, tuple[bytes, bytes]] = {}
        self._dealt: dict[int, _Dealt] = {}
        self._unreadable: set[tuple[int, int]] = set()
        self.bytes_up = self.bytes_down = 0

    def run(
        self,
        messages: Sequence[Message],
        layout_of: LayoutOf,
        before_unmasking: Callable[[list[str]], None] = lambda names: None,
    ) -> Summed:
        """Ask every client a question, and return the sum of the answers.

        Args:
            messages: The question to each client.
            layout_of: How values are quantized.
            before_unmasking: Called with the names of those in the sum, before anything is learned.

        Raises:
            UserError: Too few clients are left, or the first failed where a failure ends the run.
        """
        self._agree()
        arrays, layout, alive = self._collect(messages, layout_of)
        names = sorted(self._members[i].client for i in alive)
        before_unmasking(names)
        self._unmask(arrays, alive)
        values = {n: block.decode(arrays[n], self.clients) for n, block in layout.items()}
        cut = round(float(values.pop(CUT)[0]))
        if cut < 0 or not all(np.isfinite(value).all() for value in values.values()):
            raise UserError(f"The sum of {self._what} is none: a client masked it otherwise.")
        return Summed(values, names, cut, self.bytes_up, self.bytes_down)

    # ── stages ──────────────────────────────────────────────────────────────────────────────────

    def _agree(self) -> None:
        """Run stages 1 and 2: keys, and shares of secrets."""
        about = {"session": self._session, "clients": self.clients}
        asked = {i: {**about, "index": i} for i in range(self.clients)}
        for i, record in self._ask(KEYS, asked, "keys"):
            pair = (record.get("mask-key"), record.get("box-key"))
            taken = {key for keys in self._keys.values() for key in keys}
            if not all(map(usable, pair)) or len({*taken, *pair}) < len(taken) + 2:
                self._refuse(i, "its public keys are none, or another client's")
                continue
            self._keys[i] = pair  # type: ignore[assignment]
        alive = self._left(self._keys, "have sent keys")
        neighborhood = {i: self._about_neighbors(i, alive) for i in alive}
        for i, record in self._ask(SHARES, neighborhood, "shares"):
            dealt = self._dealt_by(i, neighborhood[i]["peers"], record)
            if dealt is None:
                self._refuse(i, "its shares are not one for each neighbor")
            else:
                self._dealt[i] = dealt
        kept = self._left(self._dealt, "have shared their secrets")
        self._dealt = {i: self._dealt[i] for i in kept}

    def _about_neighbors(self, i: int, alive: Collection[int]) -> dict[str, Any]:
        peers = [peer for peer in self._near[i] if peer in alive]
        mask, box = zip(*(self._keys[peer] for peer in peers), strict=True)
        keys = {"mask-keys": list(mask), "box-keys": list(box)}
        return {"session": self._session, "peers": peers, **keys}

    def _dealt_by(self, i: int, peers: list[int], record: Record) -> _Dealt | None:
        to, boxes, proofs = (record.get(name, []) for name in ("to", "boxes", "proofs"))
        seed = record.get("seed")
        sizes = to == peers and len(boxes) == len(peers) and len(proofs) == len(peers) + 1
        whole = sizes and all(isinstance(p, bytes) and len(p) == 64 for p in proofs)
        small = sizes and all(isinstance(b, bytes) and len(b) <= MOST_BOX for b in boxes)
        if not (whole and small and isinstance(seed, bytes)):
            return None
        by_holder = dict(zip([i, *peers], proofs, strict=True))
        return _Dealt(dict(zip(peers, boxes, strict=True)), by_holder, seed)

    def _collect(
        self, messages: Sequence[Message], layout_of: LayoutOf
    ) -> tuple[dict[str, NDArray[Any]], Layout, list[int]]:
        """Run stage 3: add up the masked values as they come.

        Replies of the shapes that most have count: a client that answers others does not decide
        for the rest.
        """
        sums: dict[Any, tuple[dict[str, NDArray[Any]], Layout, list[int]]] = {}
        asked = {self._index[m.metadata.dst_node_id]: m for m in messages}
        contents = {i: self._with_boxes(i, asked[i]) for i in self._dealt}
        what = f"{self._what}, masked values"
        for i, reply in self._exchange(contents, what):
            try:
                arrays, layout = self._masked(reply, layout_of, what)
            except UserError as error:
                self._refuse(i, str(error))
                continue
            kind = tuple(sorted((name, block.shape) for name, block in layout.items()))
            total, _, those = sums.setdefault(kind, (arrays, layout, []))
            if those:
                for name, array in arrays.items():
                    total[name] += array
            those.append(i)
            about = reply.content.config_records.get(SECURE, ConfigRecord())
            self._complaints(i, about.get("unreadable", []))
        for _, _, those in sorted(sums.values(), key=lambda found: len(found[2]))[:-1]:
            for i in those:
                self._refuse(i, "its answer has other parameters than most")
        if not sums:
            self._failures.check(0, self.clients, self._what)
        total, layout, alive = max(sums.values(), key=lambda found: len(found[2]))
        self._check_holders(alive, "have sent their values")
        return total, layout, sorted(alive)

    def _with_boxes(self, i: int, message: Message) -> Message:
        peers = [peer for peer in self._near[i] if peer in self._dealt]
        record: dict[str, Any] = {
            "session": self._session,
            "from": peers,
            "boxes": [self._dealt[peer].boxes[i] for peer in peers],
            "proofs": [self._dealt[peer].proofs[i] for peer in peers],
        }
        content = RecordDict({**message.content, SECURE: ConfigRecord(record)})
        about = message.metadata
        return Message(content, about.dst_node_id, about.message_type, group_id=about.group_id)

    def _masked(
        self, reply: Message, layout_of: LayoutOf, what: str
    ) -> tuple[dict[str, NDArray[Any]], Layout]:
        record = the_arrays(reply)
        shapes = {n: tuple(map(int, array.shape)) for n, array in record.items()}
        if shapes.pop(CUT, None) != (1,):
            raise UserError("its answer is not masked")
        layout = counting_cuts(layout_of(shapes))
        arrays = {}
        for name, block in layout.items():
            kind = KINDS[block.bits]
            arrays[name] = read_array(record[name], kind, block.shape, f"{what}: {name}").copy()
        return arrays, layout

    def _complaints(self, holder: int, owners: Any) -> None:
        """Note whose shares a client cannot read: either of the two may be at fault."""
        for owner in owners if isinstance(owners, list) else []:
            if owner in self._dealt and holder in self._dealt[owner].boxes:
                self._unreadable.add((holder, owner))
                of, by = self._members[owner].client, self._members[holder].client
                self._failures.remark(
                    f"Client {by}, {self._what}: the shares that client {of} gave it are not what "
                    f"{of} said of them; one of the two is at fault."
                )

    def _unmask(self, total: dict[str, NDArray[Any]], alive: list[int]) -> None:
        """Run stage 4: take the masks off the sum."""
        dropped = [i for i in self._dealt if i not in alive]
        near = {i: {i, *self._near[i]} for i in self._dealt}
        asked = {
            i: {
                "session": self._session,
                "alive": [other for other in alive if other in near[i]],
                "dropped": [other for other in dropped if other in near[i]],
            }
            for i in alive
        }
        shares: dict[int, list[bytes]] = {i: [] for i in self._dealt}
        for i, record in self._ask(UNMASK, asked, "unmasking", in_the_sum=True):
            good = self._shares_from(i, asked[i], record, shares)
            if good:
                self._failures.usable(self._members[i].client)
        for i in alive:
            seed = self._secret(i, "seed", shares[i])
            add_mask(total, mask_key(self._session, seed), -1)
        for i in dropped:
            key = self._secret(i, "key", shares[i])
            for other in alive:
                if other in near[i]:
                    common = agreed(key, self._keys[other][0])
                    sign = -1 if other > i else 1
                    add_mask(total, mask_key(self._session, common), sign)

    def _shares_from(
        self, holder: int, asked: Record, record: Record, shares: dict[int, list[bytes]]
    ) -> bool:
        """Take the shares that are what their owners proved; whether all are."""
        wrong = []
        for kind, owners, place in (("seed", asked["alive"], 0), ("key", asked["dropped"], 1)):
            given = record.get(f"{kind}s", [])
            given = given if len(given) == len(owners) else [b""] * len(owners)
            for owner, share in zip(owners, given, strict=True):
                share = share if isinstance(share, bytes) else b""
                known = self._dealt[owner].proofs[holder]
                computed = proof(kind, self._session, owner, holder, share)
                if computed == known[32 * place : 32 * place + 32]:
                    shares[owner].append(share)
                elif (holder, owner) not in self._unreadable:
                    wrong.append(self._members[owner].client)
        if wrong:
            name = self._members[holder].client
            self._failures.blame(
                name, f"Client {name}, {self._what}: wrong shares of {', '.join(sorted(wrong))}."
            )
        return not wrong

    def _secret(self, owner: int, kind: str, shares: list[bytes]) -> bytes:
        """Put a client's seed or mask key together, and prove it."""
        if len(shares) < self._least:
            raise UserError(
                f"{len(shares)} of {self._least} shares that are needed of client "
                f"{self._members[owner].client}'s {kind} arrived in {self._what} "
                "(privacy.secure_threshold): start again to repeat it."
            )
        secret = join(shares[: self._least])
        if kind == "seed":
            computed = proof("seed", self._session, owner, owner, secret)
            right = computed == self._dealt[owner].seed
        else:
            right = bool(secret) and public_of(secret) == self._keys[owner][0]
        if not right:
            name = self._members[owner].client
            reason = f"Client {name}, {self._what}: its shares do not give its {kind}."
            self._failures.blame(name, reason)
            raise UserError(f"{reason} The sum cannot be unmasked: start again to repeat it.")
        return secret

    # ── who is left ─────────────────────────────────────────────────────────────────────────────

    def _left(self, done: Collection[int], what: str) -> list[int]:
        """Return those that have enough neighbors left to continue with."""
        alive = set(done)
        while True:
            few = {i for i in alive if len(alive & {i, *self._near[i]}) < self._least}
            if not few:
                break
            alive -= few
        self._check(len(alive), len(done), what)
        for i in sorted(set(done) - alive):
            self._refuse(i, "too few of its neighbors are left")
        return sorted(alive)

    def _check_holders(self, alive: Collection[int], what: str) -> None:
        """Check that every secret that is needed has enough holders."""
        there = set(alive)
        enough = all(len(there & {i, *self._near[i]}) >= self._least for i in self._dealt)
        self._check(len(there) if enough else 0, len(there), what)

    def _check(self, enough: int, count: int, what: str) -> None:
        if enough < FEWEST:
            first = next(iter(self._failures.reasons.values()), "none failed.")
            raise UserError(
                f"Only {count} of {self.clients} clients {what} in {self._what}, too few to finish "
                f"a secure sum (privacy.secure_threshold): start again to repeat it. The first "
                f"that failed: {first}"
            )
        self._failures.check(enough, self.clients, self._what)

    # ── messages ────────────────────────────────────────────────────────────────────────────────

    def _ask(
        self, kind: str, records: Mapping[int, Record], stage: str, in_the_sum: bool = False
    ) -> Iterator[tuple[int, Record]]:
        """Send a record to each client, and yield the one that it answers."""
        contents = {
            i: Message(
                RecordDict({SECURE: ConfigRecord(dict(record))}), self._members[i].node, kind
            )
            for i, record in records.items()
        }
        for i, reply in self._exchange(contents, f"{self._what}, {stage}", in_the_sum):
            record = reply.content.config_records.get(SECURE, ConfigRecord())
            lists = all(isinstance(value, list | bytes | str) for value in record.values())
            if not lists or record.get("session") != self._session:
                self._refuse(i, "its answer is of another sum", in_the_sum)
                continue
            yield i, record

    def _exchange(
        self, messages: Mapping[int, Message], what: str, in_the_sum: bool = False
    ) -> Iterator[tuple[int, Message]]:
        failures = self._failures.blaming() if in_the_sum else self._failures
        self.bytes_down += sum(content_bytes(message.content) for message in messages.values())
        replies: Iterable[tuple[Member, Message]] = exchange(
            self._grid, list(messages.values()), self._by_node, self._timeout, what, failures,
            renewed=self._renewed,
        )  # fmt: skip
        for member, reply in replies:
            self.bytes_up += content_bytes(reply.content)
            yield self._index[member.node], reply

    def _refuse(self, i: int, reason: str, in_the_sum: bool = False) -> None:
        name = self._members[i].client
        text = f"Client {name}, {self._what}: {reason.rstrip('.')}."
        if in_the_sum:
            self._failures.blame(name, text)
        else:
            self._failures.add(name, text, "refused")
