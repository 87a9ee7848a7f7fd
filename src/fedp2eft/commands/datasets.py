"""`fedp2eft data list | describe | partition`."""

from __future__ import annotations

from fedp2eft.settings.data import DataSettings


def list_datasets() -> None:
    """List the data sets."""
    from rich.console import Console
    from rich.table import Table

    from fedp2eft.commands.terminal import cell
    from fedp2eft.data.registry import DATASETS

    table = Table("name", "what", "languages", "licence")
    for name, entry in DATASETS.items():
        spoken = " ".join(entry.languages) or "-"
        if len(entry.languages) > 40:
            spoken = f"{len(entry.languages)}: {' '.join(entry.languages[:10])} ..."
        table.add_row(*map(cell, (name, entry.description, spoken, entry.licence)))
    Console().print(table)


def describe(data: DataSettings, classes: bool = False) -> None:
    """Show clients, rows and labels of a data set.

    Args:
        data: The clients and their rows.
        classes: Also print how many rows of each class every client has.
    """
    from rich.table import Table

    from fedp2eft.commands.terminal import cell, console
    from fedp2eft.data.describe import classes_of_clients, repeats
    from fedp2eft.data.describe import describe as rows_of
    from fedp2eft.data.registry import load_clients
    from fedp2eft.errors import require

    loaded = load_clients(data)
    rows = rows_of(loaded)
    require(bool(rows), "The rows of data.dataset nodes are on the SuperNodes: ask their owners.")
    table = Table(*[str(name).replace("_", " ") for name in rows[0]])
    for row in rows:
        table.add_row(*[cell(_shown(value)) for value in row.values()])
    console().print(table)
    if classes and loaded.labels:
        for name, counts in classes_of_clients(loaded).items():
            console().print(cell(f"{name}: {_most_frequent(counts, len(counts))}"))
    for line in (*loaded.notes, *repeats(loaded)):
        console().print(cell(line))


def partition(data: DataSettings, out: str) -> None:
    """Write which row belongs to which client, as JSON.

    Args:
        data: The clients and their rows.
        out: The JSON file.
    """
    from pathlib import Path

    from fedp2eft.data.describe import save_partition
    from fedp2eft.data.registry import load_clients

    loaded = load_clients(data)
    save_partition(loaded, Path(out).expanduser())
    print(f"{len(loaded.clients)} clients: {out}")


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return _most_frequent(value, 3)
    return f"{value:.0f}" if isinstance(value, float) else str(value)


def _most_frequent(counts: dict[str, int], most: int) -> str:
    """The most frequent classes with their rows, and how many more classes have any."""
    found = sorted((n, name) for name, n in counts.items() if n)[::-1]
    shown = ", ".join(f"{name} {n}" for n, name in found[:most])
    return shown + (f", {len(found) - most} more" if len(found) > most else "")
