"""What the surveys of the seen clients gave, kept in `surveys/<method>-r<rank>.json`.

{"phi": digest of the parameters that the clients had, null without any,
 "prepared": tensors by name, as nested lists}
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedp2eft.files import read_json, write_json
from fedp2eft.results.at_budget import AtBudget

ANY = "any"
"""In place of a digest: whatever parameters the clients had."""


def read_survey(run: Path, at: AtBudget, phi: str | None = ANY) -> dict[str, Any] | None:
    """Return what a survey gave, as nested lists by name; None if it was not kept.

    Args:
        run: The run folder.
        at: The method, and at which budget.
        phi: Digest of the present parameters; what the clients answered to others is not returned.
    """
    kept = read_json(_path(run, at))
    if isinstance(kept, dict):
        return dict(kept["prepared"]) if phi in (ANY, kept.get("phi")) else None
    return _of_a_comparison_before_0_3(_path(run, at).with_suffix(".safetensors"))


def _of_a_comparison_before_0_3(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    from safetensors.numpy import load_file

    return {name: value.tolist() for name, value in load_file(path).items()}


def write_survey(run: Path, at: AtBudget, phi: str | None, prepared: Mapping[str, Any]) -> None:
    """Keep what a survey gave.

    Args:
        run: The run folder.
        at: The method, and at which budget.
        phi: Digest of the parameters that the clients had, if they had any.
        prepared: Nested lists by name.
    """
    write_json(_path(run, at), {"phi": phi, "prepared": dict(prepared)})


def _path(run: Path, at: AtBudget) -> Path:
    return run / "surveys" / f"{at}.json"
