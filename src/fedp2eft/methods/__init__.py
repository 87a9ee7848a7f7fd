"""Personalization methods by name: one small file each, registered by one line.

What each one is, costs and lets out of a client: docs/methods.md.
"""

from __future__ import annotations

import json

from fedp2eft.errors import UserError, nearest
from fedp2eft.methods import controls, label_prior, tuned
from fedp2eft.methods.adalora import adalora
from fedp2eft.methods.base import base
from fedp2eft.methods.bt_lora import bt_lora
from fedp2eft.methods.fedl2p.method import fedl2p
from fedp2eft.methods.fedp2eft import fedp2eft
from fedp2eft.methods.lora import lora
from fedp2eft.methods.method import ClientSide, Method, Outcome, Survey
from fedp2eft.settings.experiment import Settings

METHODS: dict[str, Method] = {
    "base": Method(base, ranked=False),
    "lora": Method(lora),
    "fedl2p": Method(fedl2p, shared="fedl2p"),
    "fedp2eft": Method(fedp2eft, shared="psg"),
    "fedp2eft-normalized": Method(
        fedp2eft, shared="psg", variant={"local": {"prior": "normalized"}}
    ),
    "adalora": Method(adalora),
    "bt-lora": Method(bt_lora),
    "lora-tuned": tuned.method(tuned.uniform_ones),
    "fedp2eft-tuned": tuned.method(tuned.unit_predicted, shared="psg"),
    "fedp2eft-structure": Method(controls.structure_only, shared="psg"),
    "fedp2eft-scale": Method(controls.scale_only, shared="psg"),
    "fedp2eft-random": Method(controls.random_structure, shared="psg"),
    "fedp2eft-global": Method(
        controls.global_lambda, shared="psg", surveys=(controls.lambda_survey,)
    ),
    "fedp2eft-layerwise": Method(fedp2eft, shared="psg", variant={"adapter": {"layerwise": True}}),
    "label-prior": Method(label_prior.label_prior, ranked=False, surveys=label_prior.surveys),
}

__all__ = [
    "METHODS",
    "ClientSide",
    "Method",
    "Outcome",
    "Survey",
    "check_trained_for",
    "method_named",
]


def method_named(name: str) -> Method:
    """The method of that name; an unknown one is a `UserError`."""
    if name not in METHODS:
        known = ", ".join(METHODS)
        raise UserError(
            f"Method {name!r} is unknown.{nearest(name, list(METHODS))} Known: {known}."
        )
    return METHODS[name]


def check_trained_for(name: str, settings: Settings) -> None:
    """Raise `UserError` unless a run under these settings trains what the method starts from."""
    if settings.privacy.on and method_named(name).shared == "fedl2p":
        raise UserError(
            "privacy covers the PSG's rounds, not FedL2P's: leave fedl2p out of "
            "evaluation.methods, or privacy off."
        )
    for section, keys in method_named(name).variant.items():
        for key, wanted in keys.items():
            have = getattr(getattr(settings, section), key)
            if have != wanted:
                have, wanted = json.dumps(have), json.dumps(wanted)
                raise UserError(
                    f"Method {name} needs a PSG trained with {section}.{key}: {wanted}, and this "
                    f"run has {have}: set it, or use `fedp2eft compare`."
                )
