"""The command line's parser: a function's arguments, or all settings, as options with their help.

Apart from `settings.reading`, so that only what needs a parser imports jsonargparse.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from itertools import islice
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, set_loader

from fedp2eft.errors import UserError, nearest
from fedp2eft.settings.reading import settings_class
from fedp2eft.settings.words import load_words

set_loader("words", load_words, (yaml.YAMLError,), json_superset=True)

FOLDERS = ("folder", "run")
"""Arguments of commands that name a folder."""


class Parser(ArgumentParser):
    """jsonargparse's parser; a mistake is a `UserError` of one line instead of a usage page."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"parser_mode": "words"} | kwargs)
        self._names: list[str] = []
        self._settings: set[str] = set()

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

        An argument `options` stands for all settings, whose words are handed over as they are. One
        named `config` that has a default is a word that may be left out.

        Args:
            function: Its signature and docstring say what there is.
            positional: Whether those without a default are words in their order, not options.
        """
        self.description = (function.__doc__ or "").split("Args:")[0].strip()
        self._names = list(signature(function).parameters)
        self.add_function_arguments(
            function, as_group=False, as_positional=positional, skip={"options"}
        )
        for action in self._actions:
            if action.default is False:
                action.nargs, action.const = "?", True
            if action.dest in FOLDERS:
                action.metavar = "DIR"
            if action.dest == "config" and action.option_strings:
                for name in action.option_strings:
                    del self._option_string_actions[name]
                action.option_strings, action.nargs, action.metavar = [], "?", "CONFIG"
        if "options" in self._names:
            own = self._known_options()
            named = [
                f"[{a.metavar}]" if a.nargs == "?" else a.dest.upper()
                for a in self._actions
                if not a.option_strings
            ]
            self.usage = " ".join([self.prog, *named, "[OPTIONS]"])
            self.add_class_arguments(settings_class(), as_group=False)
            for action in self._actions:  # `--x+ VALUE` adds to a list; settings take whole ones
                lists = {name for name in action.option_strings if name.endswith("+")}
                action.option_strings = [n for n in action.option_strings if n not in lists]
                for name in lists:
                    del self._option_string_actions[name]
            self._settings = {name for name in self._known_options() if name not in own}

    def arguments(self, words: list[str]) -> dict[str, Any]:
        """Return the arguments of the function that was added, read from a command's words."""
        rest, options = [], []
        following = iter(words)
        for word in following:
            name, equals, _ = word.partition("=")
            if name in self._settings:
                options += [word] if equals else [word, *islice(following, 1)]
            else:
                rest.append(word)
        values = self.instantiate_classes(self.parse_args(rest)).as_dict() | {"options": options}
        return {name: values[name] for name in self._names}

    def _known_options(self) -> list[str]:
        return [option for action in self._actions for option in action.option_strings]
