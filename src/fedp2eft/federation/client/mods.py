"""Flower mods around the ClientApp's handlers: its end, its errors, privacy of φ."""

from __future__ import annotations

import logging
from collections.abc import Callable
from math import isfinite, log, sqrt

from flwr.app import Context, Error, Message
from flwr.clientapp.mod import LocalDpMod, adaptiveclipping_mod, fixedclipping_mod

from fedp2eft.errors import ShareableError, UserError
from fedp2eft.federation.hooks import CLIENT_APP_RAISED, CLIP_NORM, end_with_parent, noise_from
from fedp2eft.federation.local import is_local
from fedp2eft.federation.wire.messages import the_config
from fedp2eft.settings.peers import PrivacySettings
from fedp2eft.settings.reading import settings_of_run

logger = logging.getLogger(__name__)

Handler = Callable[[Message, Context], Message]


def end_with_supernode(message: Message, context: Context, handle: Handler) -> Message:
    """End this process together with the SuperNode that it works for."""
    end_with_parent()
    return handle(message, context)


def send_errors(message: Message, context: Context, handle: Handler) -> Message:
    """Send an error to the server as one line that holds nothing of the client's data.

    The text of an error may quote a row or a label. Outside the server's own process only a
    `ShareableError` goes out as it is. Of any other, the server receives only its kind, and the
    client's own log has the rest.
    """
    if is_local():
        return handle(message, context)  # all data is the user's own: the engine reports it in full
    try:
        return handle(message, context)
    except ShareableError as error:
        text = str(error)
    except UserError as error:
        logger.error("%s", error)
        text = "it cannot continue; see its own log."
    except Exception as error:
        logger.exception("%s failed.", message.metadata.message_type)
        text = f"it failed ({type(error).__name__}); see its own log."
    return Message(Error(CLIENT_APP_RAISED, text), reply_to=message)


def keep_private(message: Message, context: Context, handle: Handler) -> Message:
    """Clip the change of φ, and add noise to it, where the settings have the client do so."""
    s = settings_of_run(context.run_config).privacy
    if not s.on or s.clip_on == "server" or s.secure:  # a sum brings noise of its own
        return handle(message, context)
    round_ = int(the_config(message)["server-round"])  # type: ignore[arg-type]
    try:
        if s.noise == "client":
            # Flower's mod takes an ε of its own and makes the noise from it: this one gives z·C.
            its_epsilon = sqrt(2 * log(1.25 / s.delta)) / s.noise_multiplier
            mod = LocalDpMod(s.clip_norm, s.clip_norm, its_epsilon, s.delta)
            with noise_from(s.test_seed, context.node_id, round_):
                return mod(message, context, handle)
        check_norm(message, s)
        clip = fixedclipping_mod if s.clipping == "fixed" else adaptiveclipping_mod
        return clip(message, context, handle)
    except ZeroDivisionError as error:  # Flower divides by the norm of the change
        raise ShareableError("φ did not change, so there is nothing to clip.") from error


def check_norm(message: Message, settings: PrivacySettings) -> None:
    """Raise `UserError` unless the norm that the server asks for is one to agree to."""
    norm = the_config(message).get(CLIP_NORM)
    if not isinstance(norm, float) or not isfinite(norm) or norm <= 0:
        raise ShareableError("The server sent no clip norm.")
    if settings.clipping == "fixed" and norm != settings.clip_norm:
        raise ShareableError(f"The server asks for clip norm {norm}, not privacy.clip_norm.")
