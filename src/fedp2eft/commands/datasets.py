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


def describe(data: DataSettings) -> None:
    """Show clients, rows and labels of a data set.

    Args:
        data: The clients and their rows.
    """
    from rich.table import Table

    from fedp2eft.commands.terminal import cell, console
    from fedp2eft.data.describe import describe as rows_of
    from fedp2eft.data.describe import repeats
    from fedp2eft.data.registry import load_clients
    from fedp2eft.errors import require

    loaded = load_clients(data)
    rows = rows_of(loaded)
    require(bool(rows), "The rows of data.dataset nodes are on the SuperNodes: ask their owners.")
    table = Table(*[str(name).replace("_", " ") for name in rows[0]])
    for row in rows:
        table.add_row(*[cell(_shown(value)) for value in row.values()])
    console().print(table)
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
        return " ".join(f"{key} {count}" for key, count in value.items())
    return f"{value:.0f}" if isinstance(value, float) else str(value)
