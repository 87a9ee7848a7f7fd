"""FedP²EFT: a federation learns which LoRA ranks each client needs.

Clients keep their text; a small network (the PSG) learns to look at a client's text inside a frozen
model and to say which ranks of which layers that client should have; every client leaves with an
ordinary PEFT adapter. (Lee et al., AAAI 2026, arXiv 2502.04387.)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedp2eft.adapters.btlora import BTLora
    from fedp2eft.adapters.trainer import BTLoraTrainer
    from fedp2eft.api import Adapter, evaluate, export, personalize
    from fedp2eft.client.side import ClientSide, Outcome
    from fedp2eft.errors import UserError
    from fedp2eft.experiment.compare import compare
    from fedp2eft.experiment.train import train
    from fedp2eft.generator import PSG
    from fedp2eft.methods import METHODS, Method, register
    from fedp2eft.results.rows import Results, read_results
    from fedp2eft.results.tables import write_tables
    from fedp2eft.settings.experiment import Settings
    from fedp2eft.settings.reading import read_settings, settings_from

# Names are imported when first used: `import fedp2eft` and the command line's help stay fast.
_HOME = {
    "PSG": "fedp2eft.generator",
    "BTLora": "fedp2eft.adapters.btlora",
    "BTLoraTrainer": "fedp2eft.adapters.trainer",
    "Adapter": "fedp2eft.api",
    "personalize": "fedp2eft.api",
    "evaluate": "fedp2eft.api",
    "export": "fedp2eft.api",
    "train": "fedp2eft.experiment.train",
    "compare": "fedp2eft.experiment.compare",
    "Results": "fedp2eft.results.rows",
    "read_results": "fedp2eft.results.rows",
    "write_tables": "fedp2eft.results.tables",
    "Settings": "fedp2eft.settings.experiment",
    "read_settings": "fedp2eft.settings.reading",
    "settings_from": "fedp2eft.settings.reading",
    "METHODS": "fedp2eft.methods",
    "Method": "fedp2eft.methods",
    "register": "fedp2eft.methods",
    "ClientSide": "fedp2eft.client.side",
    "Outcome": "fedp2eft.client.side",
    "UserError": "fedp2eft.errors",
}

__all__ = [
    "METHODS",
    "PSG",
    "Adapter",
    "BTLora",
    "BTLoraTrainer",
    "ClientSide",
    "Method",
    "Outcome",
    "Results",
    "Settings",
    "UserError",
    "compare",
    "evaluate",
    "export",
    "personalize",
    "read_results",
    "read_settings",
    "register",
    "settings_from",
    "train",
    "write_tables",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fedp2eft' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
