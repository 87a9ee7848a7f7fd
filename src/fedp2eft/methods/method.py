"""What a personalization method is: a function from one client and a rank budget to an adapter.

Methods are known by name: the built-in ones, those that `register` is called with, and those of
installed packages, which name them in the entry-point group `fedp2eft.methods`. Nothing heavy is
imported here: the command line builds its help from the sections that methods bring.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from fedp2eft.errors import UserError
from fedp2eft.settings.reading import add_section

if TYPE_CHECKING:
    from torch import Tensor

    from fedp2eft.client.phase import Phase
    from fedp2eft.client.side import ClientSide, Outcome

GROUP = "fedp2eft.methods"
WITH_PRIOR = "+prior"
CALIBRATED = "+calibrated-prior"
"""Ending of the variants that `Methods` makes of the methods that train an adapter."""
TAKEN = {
    "adapters", "base", "cells", "checkpoints", "clients", "compare", "deliver", "generations",
    "personalize", "psg", "shared", "surveys", "tensorboard",
}  # fmt: skip
"""Names that no method's phase may have: a run folder, or a progress bar, has them already."""


@dataclass(frozen=True)
class Survey:
    """A question that the server asks every seen client, before the method is used.

    The method sees the sum of all answers alone; with `privacy.secure_sums` so does the server.

    Args:
        ask: What one client answers: tensors by name, of the same names and shapes for all clients.
        combine: The sums of the answers by name (float64), and the number of clients, to what every
            client then receives.
        limit: Largest magnitude of an entry. A secure sum cuts larger ones, and counts in steps of
            about limit · clients / 2⁶³.
        limits: The same by name, for those that have another.
        held_out: Whether it tries a method on held-out rows: only clients whom the base was not
            trained on are asked, if there are any (`base.held_out`).
    """

    ask: Callable[[ClientSide, int], dict[str, Tensor]]
    combine: Callable[[Mapping[str, Tensor], int], dict[str, Tensor]]
    limit: float = 2.0**31
    limits: Mapping[str, float] = field(default_factory=dict)
    held_out: bool = False


@dataclass(frozen=True)
class Method:
    """A personalization method.

    Args:
        fit: One client's scores and adapter at a rank budget.
        shared: Name of the phase that trains the parameters that it starts from, if any: "psg", or
            that of its own `phase`, which sets it.
        ranked: Whether the rank budget changes anything.
        surveys: What the server must ask the seen clients first, one after the other: a client
            that is asked the second knows what all answers to the first gave.
        classes: Whether it is for classification alone.
        texts: Whether it is for causal LMs alone.
        label_prior: Whether it needs q, the seen clients' label distribution, in a classification.
        kept: Whether what the surveys gave is kept with the PSG, so that one client alone can use
            the method (`fedp2eft.personalize`).
        variant: Settings (section → key → value) that its phase must be trained under.
        settings: Dataclass of its own section of the settings; the client's is `client.own`.
        section: Name of the section; the method's own name, with "_" for "-", if absent.
        phase: A phase of its own; a run that names the method has it.
    """

    fit: Callable[[ClientSide, int], Outcome]
    shared: str | None = None
    ranked: bool = True
    surveys: tuple[Survey, ...] = ()
    classes: bool = False
    texts: bool = False
    label_prior: bool = False
    kept: bool = False
    variant: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    settings: type | None = None
    section: str | None = None
    phase: Phase | None = None

    def __post_init__(self) -> None:
        if self.phase:
            object.__setattr__(self, "shared", self.phase.name)

    def with_prior(self, name: str) -> Method:
        """Return the method with the client's label prior on its logits (docs/label-prior.md).

        Args:
            name: The method's own.
        """
        local = {**self.variant.get("local", {}), "logit_adjustment": "own"}
        return replace(
            self,
            section=self.section or name.replace("-", "_"),
            classes=True,
            variant={**self.variant, "local": local},
        )

    def calibrated(self, name: str) -> Method:
        """Return the method with the client's calibrated label prior on its logits.

        It personalizes with it; its federated training, if it has any, is without.

        Args:
            name: The method's own.
        """

        def fit(client: ClientSide, rank: int) -> Outcome:
            side = client.calibrated()
            outcome = self.fit(side, rank)
            kept = outcome.weights
            return replace(outcome, weights=kept and side.carrying(kept))

        section = self.section or name.replace("-", "_")
        return replace(self, fit=fit, section=section, classes=True, label_prior=True)


class Methods(MutableMapping[str, Method]):
    """Methods by name; those of installed packages are loaded when it is first looked at.

    Every method NAME with a rank budget is there as NAME+prior, too, unless it has its own way with
    the label prior or is for causal LMs alone; and as NAME+calibrated-prior, unless it is trained
    under other settings or asks the seen clients.
    """

    def __init__(self) -> None:
        self._known: dict[str, Method] = {}
        self._waiting: list[EntryPoint] | None = None

    def load(self) -> dict[str, Method]:
        """Load the methods of installed packages, once.

        Raises:
            UserError: One cannot be loaded; the message names it.
        """
        if self._waiting is None:
            self._waiting = list(entry_points(group=GROUP))
        while self._waiting:
            _load(self._waiting[0], self)
            self._waiting.pop(0)
        return self._known

    def __getitem__(self, name: str) -> Method:
        return self.load()[name]

    def __setitem__(self, name: str, method: Method) -> None:
        if method.phase:
            self._check(name, method.phase)
        if method.settings:
            add_section(method.section or name.replace("-", "_"), method.settings)
        self._known[name] = method
        own = method.label_prior or method.texts  # its own way with the prior, or no classes
        if method.ranked and not own and not name.endswith(WITH_PRIOR):
            self._known[name + WITH_PRIOR] = method.with_prior(name)
            if not (method.surveys or method.variant):
                self._known[name + CALIBRATED] = method.calibrated(name)

    def _check(self, name: str, phase: Phase) -> None:
        """Raise `UserError` unless files, seeds and messages can have the phase's name."""
        others = (other.phase for key, other in self._known.items() if key != name)
        taken = any(other and other.name == phase.name and other != phase for other in others)
        if taken or phase.name in TAKEN or not re.fullmatch(r"[A-Za-z0-9-]+", phase.name):
            raise UserError(
                f"Method {name} cannot have a phase {phase.name!r}: choose a name of letters, "
                "digits and dashes that nothing else has."
            )

    def __delitem__(self, name: str) -> None:
        del self._known[name]
        self._known.pop(name + WITH_PRIOR, None)
        self._known.pop(name + CALIBRATED, None)

    def __iter__(self) -> Iterator[str]:
        return iter(self.load())

    def __len__(self) -> int:
        return len(self.load())


METHODS = Methods()


def register(name: str, method: Method) -> None:
    """Make a method known by a name, with its section of the settings.

    Raises:
        UserError: The name, or that of its section, is taken.
    """
    if METHODS._known.get(name, method) is not method:
        raise UserError(f"There is a method {name!r} already: choose another name.")
    METHODS[name] = method


def _load(entry: EntryPoint, methods: Methods) -> None:
    """Register the `Method` that an entry point names, or load the module that registers some."""
    whose = f"{entry.dist.name if entry.dist else '?'} ({entry.name} = {entry.value})"
    before = len(methods._known)
    try:
        found = entry.load()
        if isinstance(found, Method):
            register(entry.name, found)
    except Exception as error:  # whatever somebody else's code raises
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"The methods of the installed package {whose} cannot be loaded: {why}. "
            "Fix or uninstall it."
        ) from error
    if len(methods._known) == before:
        raise UserError(
            f"The installed package {whose} names no Method and registers none: correct its entry "
            f"point of the group {GROUP}, or uninstall it."
        )
