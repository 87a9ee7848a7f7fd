"""`fedp2eft data list | describe | partition`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedp2eft.settings.reading import read_settings, settings_from

if TYPE_CHECKING:
    from fedp2eft.data.clients import ClientData


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


def describe(
    config: str | None = None, classes: bool = False, options: list[str] | None = None
) -> None:
    """Show clients, rows and labels of a data set.

    Label shift is the total variation between a client's train and test labels, 0 to 1: its mean
    and its largest value over the clients of a language and pool.

    Args:
        config: An experiment's YAML file. Default: all settings at their defaults.
        classes: Also print how many rows of each class every client has.
        options: Settings that override the file's.
    """
    from rich.table import Table

    from fedp2eft.commands.terminal import cell, console
    from fedp2eft.data.describe import classes_of_clients, repeats
    from fedp2eft.data.describe import describe as rows_of
    from fedp2eft.errors import require

    loaded = _load(config, options)
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


def partition(out: str, config: str | None = None, options: list[str] | None = None) -> None:
    """Write which row belongs to which client, as JSON.

    Args:
        out: The JSON file.
        config: An experiment's YAML file. Default: all settings at their defaults.
        options: Settings that override the file's.
    """
    from pathlib import Path

    from fedp2eft.data.describe import save_partition

    loaded = _load(config, options)
    save_partition(loaded, Path(out).expanduser())
    print(f"{len(loaded.clients)} clients: {out}")


def _load(config: str | None, options: list[str] | None) -> ClientData:
    from fedp2eft.data.registry import load_clients

    settings = read_settings(config, options) if config else settings_from({}, options)
    return load_clients(settings.data, labels_used=settings.model.task == "classification")


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return _most_frequent(value, 3)
    if isinstance(value, list):
        return ", largest ".join(f"{each:.2f}" for each in value)
    return f"{value:.0f}" if isinstance(value, float) else str(value)


def _most_frequent(counts: dict[str, int], most: int) -> str:
    """Return the most frequent classes with their rows, and how many more classes have any."""
    found = sorted((n, name) for name, n in counts.items() if n)[::-1]
    shown = ", ".join(f"{name} {n}" for n, name in found[:most])
    return shown + (f", {len(found) - most} more" if len(found) > most else "")
