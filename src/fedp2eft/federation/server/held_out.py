"""Seen clients whom the base is not trained on: they try methods on rows that it does not know."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from flwr.serverapp import Grid

from fedp2eft.data.clients import SEEN
from fedp2eft.errors import require
from fedp2eft.federation.server.admission import FIRST_ENDS, Failures
from fedp2eft.federation.server.exchange import Member, roster
from fedp2eft.methods import Survey
from fedp2eft.seeding import derive_seed
from fedp2eft.settings.experiment import Settings


def members_of(grid: Grid, settings: Settings, failures: Failures = FIRST_ENDS) -> list[Member]:
    """Ask every node who it is (`roster`), and mark the held-out clients."""
    return hold_out(roster(grid, settings.federation.timeout, failures), settings)


def hold_out(members: Sequence[Member], settings: Settings) -> list[Member]:
    """Return all members, a share of the seen ones marked as held out (`base.held_out`).

    Languages take turns, in an order drawn from the seed, so that no language gives two before
    every other has given one; within a language the clients are drawn, too.

    Raises:
        UserError: Nobody would be left to train the base.
    """
    share, seen = settings.base.held_out, [m for m in members if m.pool == SEEN]
    if not share or not seen:
        return list(members)
    number = max(1, round(share * len(seen)))
    require(
        number < len(seen),
        f"base.held_out is {share:g}: of {len(seen)} seen clients none is left to train the base. "
        "Lower it.",
    )
    draw = random.Random(derive_seed(settings.seed, "held-out clients"))
    by_language = defaultdict(list)
    for member in draw.sample(sorted(seen, key=lambda m: m.client), len(seen)):
        by_language[member.language].append(member.client)
    turns = [
        (turn, place, client)
        for place, clients in enumerate(by_language.values())
        for turn, client in enumerate(clients)
    ]
    chosen = {client for _, _, client in sorted(turns)[:number]}
    return [replace(member, held_out=member.client in chosen) for member in members]


def training_base(members: Sequence[Member]) -> list[Member]:
    """Return the seen clients whom the base is trained on."""
    return [member for member in members if member.pool == SEEN and not member.held_out]


def asked(survey: Survey, members: Sequence[Member]) -> dict[int, Member]:
    """Return the seen clients that a survey asks, by node: the held-out ones if it tries methods.

    All of them if the base is trained on all.
    """
    seen = {member.node: member for member in members if member.pool == SEEN}
    fresh = {node: member for node, member in seen.items() if member.held_out}
    return fresh if survey.held_out and fresh else seen
