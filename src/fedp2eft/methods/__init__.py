"""Personalization methods by name: one small file each, registered by one line."""

from __future__ import annotations

from fedp2eft.errors import UserError, nearest
from fedp2eft.methods.base import base
from fedp2eft.methods.fedp2eft import fedp2eft
from fedp2eft.methods.lora import lora
from fedp2eft.methods.method import ClientSide, Method, Outcome, Survey

METHODS: dict[str, Method] = {
    "base": Method(base, ranked=False),
    "lora": Method(lora),
    "fedp2eft": Method(fedp2eft, shared="psg"),
}

__all__ = ["METHODS", "ClientSide", "Method", "Outcome", "Survey", "method_named"]


def method_named(name: str) -> Method:
    """The method of that name; an unknown one is a `UserError`."""
    if name not in METHODS:
        known = ", ".join(METHODS)
        raise UserError(
            f"Method {name!r} is unknown.{nearest(name, list(METHODS))} Known: {known}."
        )
    return METHODS[name]
