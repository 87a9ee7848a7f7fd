"""Personalization methods by name: one small file each, registered by one line.

What each one is, costs and lets out of a client: docs/methods.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from fedp2eft.client.phase import Phase, Trained, Turn, lazy
from fedp2eft.errors import UserError, nearest
from fedp2eft.methods.auto.settings import AutoSettings
from fedp2eft.methods.fedl2p import PHASE as FEDL2P
from fedp2eft.methods.fedl2p.settings import FedL2PSettings
from fedp2eft.methods.method import CALIBRATED, METHODS, WITH_PRIOR, Method, Survey, register
from fedp2eft.methods.settings import AdaLoraSettings, TuningSettings
from fedp2eft.settings.experiment import GeneratorSettings, LocalSettings, Settings

if TYPE_CHECKING:
    from fedp2eft.client.side import ClientSide, Outcome

__all__ = [
    "METHODS",
    "ClientSide",
    "Method",
    "Outcome",
    "Phase",
    "Survey",
    "Trained",
    "Turn",
    "check_private",
    "check_task",
    "check_trained_for",
    "lazy",
    "method_named",
    "phases",
    "register",
]


def _ours(target: str) -> Any:
    return lazy(f"fedp2eft.methods.{target}")


_best = _ours("tuned:best")
_tuning: dict[str, Any] = {"settings": TuningSettings, "section": "tuning"}

_rates: dict[str, Any] = {
    "local": {
        name: getattr(LocalSettings(), name) for name in ("lr", "lambda_lr", "personalize_lr")
    },
    "generator": {name: getattr(GeneratorSettings(), name) for name in ("init_lambda", "lr")},
}
"""The paper's, which are the defaults, whatever the run's are."""

_built_in = {
    "base": Method(_ours("base:base"), ranked=False),
    "majority": Method(_ours("prior:majority"), ranked=False, classes=True),
    "prior": Method(_ours("prior:prior"), ranked=False, classes=True, label_prior=True),
    "calibrated-prior": Method(
        _ours("prior:calibrated_prior"), ranked=False, classes=True, label_prior=True
    ),
    "unigram": Method(_ours("unigram:unigram"), ranked=False, texts=True),
    "lora": Method(_ours("lora:lora")),
    "fedl2p": Method(_ours("fedl2p.method:fedl2p"), phase=FEDL2P, settings=FedL2PSettings),
    "fedp2eft": Method(_ours("fedp2eft:fedp2eft"), shared="psg"),
    "auto": Method(
        _ours("auto.guard:auto"),
        shared="psg",
        surveys=(
            Survey(
                _ours("auto.choice:ask"),
                _ours("auto.choice:choose"),
                limits={"candidates": 2.0**13, "noise": 2.0**13, "products": 2.0**34},
                held_out=True,
            ),
        ),
        label_prior=True,
        kept=True,
        settings=AutoSettings,
    ),
    "adalora": Method(_ours("adalora:adalora"), settings=AdaLoraSettings),
    "bt-lora": Method(_ours("bt_lora:bt_lora")),
    "lora-paper": Method(
        _ours("lora:lora"),
        variant={"local": {"personalize_lr": _rates["local"]["personalize_lr"]}},
    ),
    "fedp2eft-paper": Method(_ours("fedp2eft:fedp2eft"), shared="psg", variant=_rates),
    "gradient": Method(_ours("gradient:gradient")),
    "gradient-shared": Method(
        _ours("gradient:gradient_shared"),
        surveys=(Survey(_ours("gradient:ask_sketch"), _ours("gradient:mean_directions"), 2.0**13),),
    ),
    "lora-tuned": Method(
        _ours("tuned:of_lora.fit"),
        surveys=(Survey(_ours("tuned:of_lora.ask"), _best, held_out=True),),
        **_tuning,
    ),
    "fedp2eft-tuned": Method(
        _ours("tuned:of_fedp2eft.fit"),
        surveys=(Survey(_ours("tuned:of_fedp2eft.ask"), _best, held_out=True),),
        shared="psg",
        **_tuning,
    ),
    "fedp2eft-structure": Method(_ours("controls:structure_only"), shared="psg"),
    "fedp2eft-scale": Method(_ours("controls:scale_only"), shared="psg"),
    "fedp2eft-random": Method(_ours("controls:random_structure"), shared="psg"),
    "fedp2eft-global": Method(
        _ours("controls:global_lambda"),
        surveys=(Survey(_ours("controls:ask_lambda"), _ours("controls:mean_lambda"), 2.0**20),),
        shared="psg",
    ),
    "fedp2eft-layerwise": Method(
        _ours("fedp2eft:fedp2eft"), shared="psg", variant={"adapter": {"layerwise": True}}
    ),
    "label-prior": Method(
        _ours("label_prior:label_prior"),
        ranked=False,
        classes=True,
        surveys=(
            Survey(_ours("label_prior:ask_counts"), _ours("label_prior:pool")),
            Survey(_ours("label_prior:ask_correct"), _best, held_out=True),
        ),
        **_tuning,
    ),
}
for _name, _method in _built_in.items():
    register(_name, _method)


def __getattr__(name: str) -> Any:
    if name not in ("ClientSide", "Outcome"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fedp2eft.client import side

    return getattr(side, name)


def method_named(name: str) -> Method:
    """Return the method of that name; an unknown one is a `UserError`."""
    if name == "fedp2eft-normalized":
        raise UserError(f"Method {name} was removed; fedp2eft 0.1.0 was the last version with it.")
    if name not in METHODS:
        known = ", ".join(each for each in METHODS if "+" not in each)
        raise UserError(
            f"Method {name!r} is unknown.{nearest(name, list(METHODS))} Known: {known}; and NAME"
            f"{WITH_PRIOR} or NAME{CALIBRATED} of those that train an adapter."
        )
    return METHODS[name]


def phases(methods: Iterable[str] | None = None) -> dict[str, Phase]:
    """Return the own phases of the named methods (default: all), by name."""
    chosen = (METHODS[name].phase for name in (METHODS if methods is None else methods))
    return {phase.name: phase for phase in chosen if phase}


def check_task(name: str, settings: Settings) -> None:
    """Raise `UserError` if the method is for another kind of task."""
    if method_named(name).classes and settings.model.task != "classification":
        raise UserError(
            f"Method {name} corrects class scores, and this task has no classes: leave it out."
        )
    if METHODS[name].texts and settings.model.task != "causal_lm":
        raise UserError(
            f"Method {name} is for causal LMs, and this task has classes: leave it out."
        )


def check_private(name: str, settings: Settings) -> None:
    """Raise `UserError` if privacy is on and the method lets out what it does not cover."""
    method = method_named(name)
    if settings.privacy.on and method.phase and not method.phase.private:
        raise UserError(
            f"privacy covers the PSG's rounds, not {method.phase.title}'s: leave {name} out of "
            "evaluation.methods, or privacy off."
        )
    if settings.privacy.on and method.surveys:
        raise UserError(
            f"privacy covers the PSG's rounds, not what method {name} asks every seen client about "
            "its own rows: leave it out of evaluation.methods, or privacy off."
        )


def check_trained_for(name: str, settings: Settings) -> None:
    """Raise `UserError` unless a run under these settings trains what the method starts from."""
    check_private(name, settings)
    check_task(name, settings)
    for section, keys in method_named(name).variant.items():
        for key, wanted in keys.items():
            have = getattr(getattr(settings, section), key)
            if have != wanted:
                have, wanted = json.dumps(have), json.dumps(wanted)
                raise UserError(
                    f"Method {name} needs a PSG trained with {section}.{key}: {wanted}, and this "
                    f"run has {have}: set it, or use `fedp2eft compare`."
                )
