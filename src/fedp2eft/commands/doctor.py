"""`fedp2eft doctor`."""

from __future__ import annotations

import json as json_text
import sys

from fedp2eft.commands.machine import Machine, look


def doctor(json: bool = False) -> None:
    """Print what this machine has and what a run on it will use.

    Args:
        json: Print JSON instead of a table.
    """
    machine = look()
    if json:
        print(json_text.dumps(machine.as_dict(), indent=2, ensure_ascii=False))
        return
    show(machine)


def show(machine: Machine) -> None:
    """Print two tables: what was found, and what a run will use."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    for title, rows in (("This machine", _found(machine)), ("Will be used", _used(machine))):
        table = Table(title=title, title_justify="left", box=box.SIMPLE, show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for name, text in rows:
            table.add_row(name, Text(text))  # square brackets are no markup here
        console.print(table)


def _found(m: Machine) -> list[tuple[str, str]]:
    torch: str = m.torch.get("error") or str(m.torch["version"])
    gpus = [f"{g['name']}, {_size(g['memory'])}, bf16 {_yes(g['bf16'])}" for g in m.gpus]
    flower = m.flower["version"] or "not installed"
    if m.flower["version"] and not m.flower["command"]:
        flower += ", but the command flwr is not to be found"
    hub = "reachable" if m.hub["reachable"] else f"no answer ({m.hub['why']})"
    if m.hub["offline"]:
        hub = "not asked, HF_HUB_OFFLINE is set"
    return [
        ("Python", f"{m.python['version']}, {m.python['platform']}"),
        ("torch", torch),
        ("cores", f"{m.cpu['usable']} of {m.cpu['cores']}, bf16 {_yes(m.torch.get('bf16'))}"),
        ("memory", f"{_size(m.memory['available'])} of {_size(m.memory['total'])} free"),
        *[
            (d["what"], f"{_size(d['free'])} free{'' if d['writable'] else ', NOT WRITABLE'}: "
             f"{d['folder']}")
            for d in m.disks
        ],
        ("GPU", "; ".join(gpus) or "none that torch sees"),
        ("Flower", flower),
        ("model hub", hub),
        *[
            (p.name, p.version or f"absent; for {p.use}: {p.install}")
            for p in m.packages
        ],
    ]  # fmt: skip


def _used(m: Machine) -> list[tuple[str, str]]:
    use = m.use()
    why = "the GPU" if m.gpus else "the CPU"
    fast = "multiplies bf16" if use["model.precision"] == "bf16" else "has no bf16 products"
    return [
        ("device auto", f"{use['model.device']}, torch threads {use['threads']}"),
        ("precision auto", f"{use['model.precision']} ({why} {fast})"),
        ("quantize", use["model.quantize"]),
        ("flwr run", use["flwr run"]),
        *[
            (each["name"], f"from {each['from']}" + (f": {each['mend']}" if each["mend"] else ""))
            for each in m.models
        ],
    ]  # fmt: skip


def _yes(value: object) -> str:
    return "yes" if value else "no"


def _size(number: int | None) -> str:
    return "unknown" if number is None else f"{number / 2**30:.1f} GiB"
