"""Make results/SET of a comparison folder: what findings stand on, small, without a row of text.

    python scripts/keep_results.py runs/masakhanews results/masakhanews

Kept are settings.yaml (without paths of this machine), the cells, structure.json of each training,
the tables and the figures as SVG. Of a cell only the known numbers and names are kept, one client a
line, losses to six decimals. All cells that are there count, whatever methods and pools the last
start of the comparison named. `fedp2eft show` and `fedp2eft report` read the folder.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedp2eft.data.clients import POOLS
from fedp2eft.data.known import KNOWN
from fedp2eft.errors import UserError
from fedp2eft.files import read_json, write_json, write_text
from fedp2eft.methods import METHODS
from fedp2eft.results.cells import CellRecord, name_of, read_cells
from fedp2eft.results.tables import write_tables
from fedp2eft.settings.experiment import Settings
from fedp2eft.settings.reading import settings_of_folder, settings_text
from fedp2eft.tasks.text_scores import TEXT_SCORES

CELL = (
    *("method", "base", "rank", "budget", "seed", "pool", "seconds", "bytes_up", "bytes_down"),
    *("peak_memory", "versions", "machine", "ablations", "prepared"),
)
CLIENT = (
    *("client", "language", "examples", "loss", "correct", "tokens", "parameters", "seconds"),
    *("steps", "choice", *TEXT_SCORES),
)
MOST_BYTES = 2_000_000


def keep(run: Path, out: Path) -> int:
    """Write what is kept of a comparison folder, in place of what is there; return its bytes.

    Raises:
        UserError: No comparison, one of a user's own rows, no cells, or a folder of something else.
    """
    cells = read_cells(run)
    if not cells:
        raise UserError(f"{run} has no cells yet: compute some first.")
    settings = of_cells(without_paths(settings_of_folder(run)), cells)
    if out.exists() and not (out / "settings.yaml").exists():
        raise UserError(f"{out} is there and holds no results: name another folder.")
    shutil.rmtree(out, ignore_errors=True)
    write_text(out / "settings.yaml", settings_text(settings))
    for cell in cells:
        write_text(out / "cells" / f"{name_of(cell)}.json", cell_text(cell))
    for path in sorted(run.glob("runs/*/structure.json")):
        write_json(out / "structure" / f"{path.parent.name}.json", read_json(path))
    write_tables(out)
    write_text(out / "results.json", _line(read_json(out / "results.json")) + "\n")
    for picture in out.glob("figures/*.png"):
        picture.unlink()
    return sum(path.stat().st_size for path in out.rglob("*") if path.is_file())


def of_cells(settings: Settings, cells: Sequence[CellRecord]) -> Settings:
    """Return the settings with the methods, ranks, pools, bases and seeds of all cells."""
    found = {
        key: {cell[key] for cell in cells} for key in ("method", "rank", "pool", "base", "seed")
    }
    known = [name for name in METHODS if name in found["method"]]
    evaluation = replace(
        settings.evaluation,
        methods=[*known, *sorted(found["method"] - {*known})],
        ranks=sorted(found["rank"] - {0}) or settings.evaluation.ranks,
        pools=[pool for pool in POOLS if pool in found["pool"]],
    )
    compared = replace(settings.compare, bases=sorted(found["base"]), seeds=sorted(found["seed"]))
    return replace(settings, evaluation=evaluation, compare=compared)


def without_paths(settings: Settings) -> Settings:
    """Return the settings as they are for somebody else: a known data set, a model by its name.

    Raises:
        UserError: The rows are a user's own, of which nothing is to be published.
    """
    data = settings.data
    if data.path and data.dataset not in KNOWN:
        raise UserError(f"Results on {data.path} are not for others: keep them yourself.")
    model = replace(settings.model, name=_name(settings.model.name))
    return replace(settings, data=replace(data, path=None), model=model)


def _name(model: str) -> str:
    return Path(model).name if Path(model).expanduser().is_dir() else model


def cell_text(cell: Mapping[str, Any]) -> str:
    """Return a cell as JSON, one client a line; what is neither number nor known name is gone."""
    head = _line({key: cell[key] for key in CELL if key in cell})
    clients = [
        _line({key: _short(client[key]) for key in CLIENT if key in client})
        for client in cell["clients"]
    ]
    return f'{head[:-1]},"clients":[\n' + ",\n".join(clients) + "\n]}\n"


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _short(value: Any) -> Any:
    return round(value, 6) if isinstance(value, float) else value


def main(arguments: list[str] | None = None) -> int:
    """Keep one comparison and say how large it is."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="the comparison folder")
    parser.add_argument("out", type=Path, help="the folder under results/")
    given = parser.parse_args(arguments)
    try:
        size = keep(given.run, given.out)
    except UserError as error:
        print(f"keep_results: {error}", file=sys.stderr)
        return 2
    print(f"{given.out}: {size / 1e6:.2f} MB")
    if size > MOST_BYTES:
        print(f"More than {MOST_BYTES / 1e6:.0f} MB: leave methods or figures out.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
