"""The command line's parser: a function's arguments, or all settings, as options with their help.

Apart from `settings.reading`, so that nothing but help, completion and small commands waits for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, set_loader

from fedp2eft.errors import UserError, nearest
from fedp2eft.settings.sections import settings_class
from fedp2eft.settings.words import load_words

set_loader("words", load_words, (yaml.YAMLError,), json_superset=True)


class Parser(ArgumentParser):
    """jsonargparse's parser; a mistake is a `UserError` of one line instead of a usage page."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"parser_mode": "words"} | kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the mistake, with the nearest known option where one is unknown."""
        line = " ".join(str(message).split())
        hint = ""
        if "unrecognized arguments" in line.lower():
            words = [word.split("=")[0] for word in line.split() if word.startswith("--")]
            hint = nearest(words[0], self._known_options()) if words else ""
        raise UserError(f"{line}.{hint} See --help.") from ex

    def add_function(self, function: Callable[..., None], positional: bool = False) -> None:
        """Add a function's arguments as options; a switch may be named without a value.

        Args:
            function: Its signature and docstring say what there is.
            positional: Whether those without a default are words in their order, not options.
        """
        self.add_function_arguments(function, as_group=False, as_positional=positional)
        for action in self._actions:
            if action.default is False:
                action.nargs, action.const = "?", True

    def _known_options(self) -> list[str]:
        return [option for action in self._actions for option in action.option_strings]


def settings_parser(parser: Parser | None = None) -> Parser:
    """A parser that has every setting as an option, e.g. `--local.lr`."""
    parser = parser or Parser(exit_on_error=True)
    parser.add_class_arguments(settings_class(), as_group=False)
    return parser
