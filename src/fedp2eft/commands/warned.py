"""Warnings of other libraries on the command line: one line if they concern the user's results."""

from __future__ import annotations

import logging
import re
import warnings

from fedp2eft.errors import visible

logger = logging.getLogger(__name__)

ABOUT_RESULTS = (
    r"Model (with|has) `tie_word_embeddings=True`",
    r"Found missing adapter keys",
    r"Unexpected keyword arguments .* are ignored",  # of an adapter's config, by a later PEFT
    r"While injecting the PEFT adapters, an inconsistency",
    r"(PiSSA|CorDA|OLoRA) changes the base weights",
    r"Adapter .* LoRA tensor\(s\) have invalid shape",
    r"Some weights of .* (were not initialized|newly initialized)",
    r"Merge lora module to .*-bit linear may get different",
    r"You have passed exclude_modules",
    r"Token indices sequence length is longer",
)
"""Beginnings of warnings by PEFT and transformers that say that a result may be another one."""
_MOST = 300


def show_what_concerns_results() -> None:
    """Show those warnings once each, as one line on stderr, and keep all others quiet.

    The others are advice to developers. PYTHONWARNINGS and -W still show them.
    """
    warnings.simplefilter("ignore")
    for beginning in ABOUT_RESULTS:
        warnings.filterwarnings("always", message=f"(?s){beginning}")
    shown = set()

    def show(message: Warning | str, *_: object, **__: object) -> None:
        line = visible(re.sub(r"\s+", " ", str(message).partition("For example:")[0]).strip())
        if line not in shown:
            shown.add(line)
            logger.warning("%s", line if len(line) <= _MOST else line[:_MOST] + "…")

    warnings.showwarning = show
