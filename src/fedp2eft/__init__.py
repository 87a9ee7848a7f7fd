"""FedP²EFT: a federation learns which LoRA ranks each client needs.

Clients keep their text; a small network (the PSG) learns to look at a client's text inside a frozen
model and to say which ranks of which layers that client should have; every client leaves with an
ordinary PEFT adapter. (Lee et al., AAAI 2026, arXiv 2502.04387.)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedp2eft.adapters.btlora import BTLora as BTLora
    from fedp2eft.adapters.trainer import BTLoraTrainer as BTLoraTrainer
    from fedp2eft.api import (
        Adapter as Adapter,
    )
    from fedp2eft.api import (
        evaluate as evaluate,
    )
    from fedp2eft.api import (
        export as export,
    )
    from fedp2eft.api import (
        personalize as personalize,
    )
    from fedp2eft.client.side import ClientSide as ClientSide
    from fedp2eft.client.side import Outcome as Outcome
    from fedp2eft.errors import UserError as UserError
    from fedp2eft.experiment.compare import compare as compare
    from fedp2eft.experiment.train import train as train
    from fedp2eft.generator import PSG as PSG
    from fedp2eft.methods import METHODS as METHODS
    from fedp2eft.methods import Method as Method
    from fedp2eft.methods import register as register
    from fedp2eft.results.rows import Results as Results
    from fedp2eft.results.rows import read_results as read_results
    from fedp2eft.results.tables import write_tables as write_tables
    from fedp2eft.settings.experiment import Settings as Settings
    from fedp2eft.settings.reading import (
        read_settings as read_settings,
    )
    from fedp2eft.settings.reading import (
        settings_from as settings_from,
    )

# Names are imported when first used: `import fedp2eft` and the command line's help stay fast.
_NAMES = {
    "adapters.btlora": "BTLora",
    "adapters.trainer": "BTLoraTrainer",
    "api": "Adapter personalize evaluate export",
    "client.side": "ClientSide Outcome",
    "errors": "UserError",
    "experiment.compare": "compare",
    "experiment.train": "train",
    "generator": "PSG",
    "methods": "METHODS Method register",
    "results.rows": "Results read_results",
    "results.tables": "write_tables",
    "settings.experiment": "Settings",
    "settings.reading": "read_settings settings_from",
}
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fedp2eft' has no attribute {name!r}")
    return getattr(import_module(f"fedp2eft.{_HOME[name]}"), name)
