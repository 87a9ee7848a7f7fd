"""Section `auto` of the settings: what is chosen from, and how."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from fedp2eft.errors import require

HoldOut = Literal["half", "folds"]
Kind = Literal["base", "prior", "lora", "structure", "fedp2eft"]


@dataclass(frozen=True)
class AutoSettings:
    """What the seen clients choose from on held-out rows, and how a client checks the choice.

    Args:
        kinds: "base": no adapter. "prior": the label prior alone (classification). "lora",
            "structure" (FedP²EFT's ranks with λ = 1) and "fedp2eft" (with its own λ): an adapter,
            in a classification with the label prior on its logits. The label prior is the
            calibrated one.
        lrs: Learning rates of the adapters.
        epochs: Passes over the client's rows.
        ranks: Rank budgets, those below the one asked for; that one is tried, too.
        folds: Parts that a seen client's rows are divided into; each is held out once, and it
            trains once per candidate and fold.
        guard: Whether a client checks the choice on held-out rows of its own.
        hold_out: "half": half of the rows are held out from the first half of the steps; an adapter
            that passes continues from there. It never costs more than one fine-tuning. "folds":
            each of `folds` parts is held out once, and an adapter that passes is then fine-tuned on
            all rows. With 2 folds it costs twice as much.
        try_adapter: Whether the check tries the seen clients' best adapter where they chose none.
        min_rows: Training rows below which a client holds none out and follows the federation.
        noise: Standard errors within which two candidates count as equal.
    """

    kinds: list[Kind] = field(
        default_factory=lambda: ["base", "prior", "lora", "structure", "fedp2eft"]
    )
    lrs: list[float] = field(default_factory=lambda: [3e-4, 1e-3, 3e-3])
    epochs: list[int] = field(default_factory=lambda: [2, 4])
    ranks: list[int] = field(default_factory=lambda: [2])
    folds: int = 2
    guard: bool = True
    hold_out: HoldOut = "half"
    try_adapter: bool = True
    min_rows: int = 8
    noise: float = 1.0

    def __post_init__(self) -> None:
        require(bool(self.kinds), "auto.kinds is empty: give at least one.")
        for name in ("lrs", "epochs"):
            values = getattr(self, name)
            require(
                bool(values) and min(values) > 0,
                f"auto.{name} is {values}; give at least one number, all above 0.",
            )
        require(not self.ranks or min(self.ranks) > 0, "auto.ranks are whole numbers from 1 up.")
        require(self.folds >= 2, f"auto.folds is {self.folds}; give 2 or more.")
        require(
            self.min_rows >= self.folds,
            f"auto.min_rows is {self.min_rows}; give at least auto.folds, {self.folds}.",
        )
        require(self.noise >= 0, f"auto.noise is {self.noise}; give 0 or more.")
