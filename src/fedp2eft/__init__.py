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
    from fedp2eft.errors import UserError
    from fedp2eft.experiment.train import train
    from fedp2eft.generator import PSG
    from fedp2eft.results.rows import Results
    from fedp2eft.settings.experiment import Settings

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
    "Results": "fedp2eft.results.rows",
    "Settings": "fedp2eft.settings.experiment",
    "UserError": "fedp2eft.errors",
}

__all__ = [
    "PSG",
    "Adapter",
    "BTLora",
    "BTLoraTrainer",
    "Results",
    "Settings",
    "UserError",
    "evaluate",
    "export",
    "personalize",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fedp2eft' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
