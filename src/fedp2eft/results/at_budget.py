"""A method at a budget, as folders and files name it: `lora-r2`, or `lora-p2`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fedp2eft.settings.experiment import Budget

_NAME = re.compile(r"(.+)-([rp])(\d+)")


@dataclass(frozen=True, order=True)
class AtBudget:
    """A method at a budget; `str` gives its name in paths and messages.

    Args:
        method: The method's name.
        rank: The budget r; 0 for a method without one.
        budget: What r counts. A run folder has one kind and names all of them "ranks".
    """

    method: str
    rank: int
    budget: Budget = "ranks"

    def __str__(self) -> str:
        letter = "p" if self.rank and self.budget == "parameters" else "r"
        return f"{self.method}-{letter}{self.rank}"

    @classmethod
    def parse(cls, name: str) -> AtBudget | None:
        """Return what a name stands for; None if it is no such name."""
        found = _NAME.fullmatch(name)
        if not found:
            return None
        return cls(found[1], int(found[3]), "parameters" if found[2] == "p" else "ranks")
