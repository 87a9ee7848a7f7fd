"""Check the languages of an experiment against those of its data set."""

import re
from collections.abc import Sequence

from fedp2eft.data.partition import rng_for
from fedp2eft.errors import UserError, nearest
from fedp2eft.settings.data import DataSettings


def new_languages_of(dataset: str, known: Sequence[str], settings: DataSettings) -> tuple[str, ...]:
    """Return the new languages; "random 40" stands for 40 of those that are named nowhere.

    They are drawn from `data.seed`.

    Args:
        dataset: its name, for the message.
        known: the languages it has.
        settings: `languages` and `new_languages`.

    Raises:
        UserError: more are to be drawn than there are.
    """
    asked = [re.fullmatch(r"random (\d+)", each) for each in settings.new_languages]
    named = [each for each, draw in zip(settings.new_languages, asked, strict=True) if not draw]
    number = sum(int(draw[1]) for draw in asked if draw)
    left = sorted(set(known) - {*settings.languages, *named})
    if number > len(left):
        raise UserError(
            f"data.new_languages draws {number} languages, and {dataset} has {len(left)} that are "
            "not named: draw fewer."
        )
    drawn = rng_for(settings.seed, "new languages").permutation(len(left))[:number]
    return (*named, *(left[place] for place in sorted(drawn)))


def choose_languages(
    dataset: str, known: Sequence[str], languages: Sequence[str] | None, new: Sequence[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return (languages of seen and unseen clients, languages of new-language clients).

    Args:
        dataset: its name, for the message.
        known: the languages it has; empty: any name will do.
        languages: those asked for; None or empty: all known ones that are not new.
        new: those that no seen client shall speak.

    Raises:
        UserError: an unknown language, one that is in both lists, or none at all.
    """
    for language in (*(languages or ()), *new):
        if known and language not in known:
            raise UserError(
                f"Language {language!r} is not in {dataset}.{nearest(language, list(known))} "
                f"It has {', '.join(known)}."
            )
    spoken = languages or [language for language in known if language not in new]
    if both := [language for language in spoken if language in new]:
        raise UserError(f"Language {both[0]!r} is in `languages` and `new_languages`: drop one.")
    if not spoken and not new:
        raise UserError(f"Name the languages of {dataset} to load.")
    return tuple(dict.fromkeys(spoken)), tuple(dict.fromkeys(new))
