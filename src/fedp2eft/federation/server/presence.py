"""Waiting for enough SuperNodes: reports it, and gives up after a set time."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

from flwr.serverapp import Grid

from fedp2eft.errors import UserError
from fedp2eft.federation.local import LocalGrid
from fedp2eft.federation.server.exchange import Member
from fedp2eft.progress import Reporter
from fedp2eft.settings.experiment import FederationSettings

SETTLE_SECONDS, SAY_SECONDS = 1.0, 30.0


def wait_for_nodes(grid: Grid, settings: FederationSettings, reporter: Reporter) -> None:
    """Wait until enough nodes are connected and no more come.

    Raises:
        UserError: `wait` seconds went by without so many.
    """
    if isinstance(grid, LocalGrid):
        return
    least, known = settings.min_clients, set(grid.get_node_ids())
    while True:
        _wait(lambda: set(grid.get_node_ids()), least, settings, reporter)
        time.sleep(SETTLE_SECONDS)  # Flower may start the server before the nodes
        now = set(grid.get_node_ids())
        if now == known and len(now) >= least:
            return
        known = now


def wait_for_members(
    grid: Grid, members: Collection[Member], settings: FederationSettings, reporter: Reporter
) -> None:
    """Wait until enough of the clients that train are connected.

    Raises:
        UserError: `wait` seconds went by without so many.
    """
    if isinstance(grid, LocalGrid):
        return
    mine = {member.node for member in members}
    least = min(settings.min_clients, len(mine))
    _wait(lambda: mine & set(grid.get_node_ids()), least, settings, reporter)


def _wait(
    here: Callable[[], set[int]], least: int, settings: FederationSettings, reporter: Reporter
) -> None:
    end = time.monotonic() + settings.wait
    say = 0.0
    while (count := len(here())) < least:
        now = time.monotonic()
        if now > end:
            raise UserError(
                f"{count} clients are connected after {settings.wait:g} s of waiting; "
                f"federation.min_clients asks for {least}. Start SuperNodes, then start the run "
                "again: it resumes from its last finished round."
            )
        if now >= say:
            reporter.note(
                f"Waiting for clients: {count} of at least {least} are connected; giving up in "
                f"{max(0.0, end - now):.0f} s."
            )
            say = now + SAY_SECONDS
        time.sleep(min(SETTLE_SECONDS, max(0.05, end - now)))
