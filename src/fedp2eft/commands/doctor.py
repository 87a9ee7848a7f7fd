"""`fedp2eft doctor`."""

from __future__ import annotations

import json as json_text

from fedp2eft.commands.machine import Found, look


def doctor(json: bool = False) -> None:
    """Print what this machine has and what a run on it will use.

    Args:
        json: Print JSON instead of a table.
    """
    machine = look()
    if json:
        print(json_text.dumps(machine, indent=2, ensure_ascii=False))
    else:
        show(machine)


def show(machine: Found) -> None:
    """Print two tables: what was found, and what a run will use."""
    from rich import box
    from rich.table import Table

    from fedp2eft.commands.terminal import cell, console

    for title, rows in (("This machine", _found(machine)), ("Will be used", _used(machine))):
        table = Table(title=title, title_justify="left", box=box.SIMPLE, show_header=False)
        table.add_column(no_wrap=True)
        table.add_column()
        for name, text in rows:
            table.add_row(name, cell(text))
        console().print(table)


def _found(m: Found) -> list[tuple[str, str]]:
    torch, flower, hub = m["torch"], m["flower"], m["hub"]
    gpus = [f"{g['name']}, {_size(g['memory'])}, bf16 {_yes(g['bf16'])}" for g in m["gpus"]]
    flower_text = flower["version"] or "not installed"
    if flower["version"] and not flower["command"]:
        flower_text += ", but the command flwr was not found"
    hub_text = "reachable" if hub["reachable"] else f"no answer ({hub['why']})"
    if hub["offline"]:
        hub_text = "not asked, HF_HUB_OFFLINE is set"
    rows = [
        ("Python", f"{m['python']['version']}, {m['python']['platform']}"),
        ("torch", torch.get("error") or str(torch["version"])),
        ("cores", f"{m['cpu']['usable']} of {m['cpu']['cores']}, bf16 {_yes(torch.get('bf16'))}"),
        ("memory", f"{_size(m['memory']['available'])} of {_size(m['memory']['total'])} free"),
    ]
    for disk in m["disks"]:
        writable = "" if disk["writable"] else ", NOT WRITABLE"
        rows.append((disk["what"], f"{_size(disk['free'])} free{writable}: {disk['folder']}"))
    rows += [
        ("GPU", "; ".join(gpus) or "none that torch sees"),
        ("Flower", flower_text),
        ("model hub", hub_text),
    ]
    for each in m["packages"]:
        rows.append(
            (each["name"], each["version"] or f"absent; for {each['use']}: {each['install']}")
        )
    return rows


def _used(m: Found) -> list[tuple[str, str]]:
    use = m["use"]
    why = "the GPU" if m["gpus"] else "the CPU"
    fast = "multiplies bf16" if use["model.precision"] == "bf16" else "has no bf16 products"
    rows = [
        ("device auto", f"{use['model.device']}, torch threads {use['threads']}"),
        ("precision auto", f"{use['model.precision']} ({why} {fast})"),
        ("quantize", use["model.quantize"]),
        ("flwr run", use["flwr run"]),
    ]
    for each in m["models"]:
        rows.append(
            (each["name"], f"from {each['from']}" + (f": {each['fix']}" if each["fix"] else ""))
        )
    return rows


def _yes(value: object) -> str:
    return "yes" if value else "no"


def _size(number: int | None) -> str:
    return "unknown" if number is None else f"{number / 2**30:.1f} GiB"
