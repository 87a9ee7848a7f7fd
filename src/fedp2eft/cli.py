"""The command line. Every command is one function whose signature is its options."""

from __future__ import annotations

import codecs
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable

from fedp2eft.commands.catalogue import (
    EXPERIMENTS,
    FUNCTIONS,
    GROUP_HELP,
    HELP,
    POSITIONAL,
    WATCH_HELP,
    function_of,
)
from fedp2eft.errors import InterruptedRunError, UserError, nearest


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit status.

    0: done. 2: a `UserError`, printed in one line. 130: interrupted.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    # bitsandbytes warns at import about a faster kernel that it could fetch, needed or not.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # other libraries' advice to developers; ours is logged
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Waiting threads spin only briefly before they yield their core: next to other processes, long
    # spinning makes every step several times slower, and no spinning wastes the second core.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    _write_what_the_terminal_knows()
    try:
        _dispatch(sys.argv[1:] if arguments is None else list(arguments))
    except InterruptedRunError as error:
        print(f"fedp2eft: {error}", file=sys.stderr)
        return 130
    except UserError as error:
        print(f"fedp2eft: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fedp2eft: Interrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 141
    return 0


PLAIN = {"–": "-", "—": "-", "…": ".", "²": "2", "·": ".", "×": "x", "±": "+/-"}
"""What stands in for our own signs where a terminal knows ASCII alone."""


def _write_what_the_terminal_knows() -> None:
    """Let output that the terminal's encoding lacks be written plainly or escaped, never fail."""

    def plainly(error: UnicodeError) -> tuple[str, int]:
        assert isinstance(error, UnicodeEncodeError)
        signs = error.object[error.start : error.end]
        known = [PLAIN.get(c) or c.encode("ascii", "backslashreplace").decode() for c in signs]
        return "".join(known), error.end

    codecs.register_error("fedp2eft-plain", plainly)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="fedp2eft-plain")


def _dispatch(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP, end="")
        return
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(f"fedp2eft {version('fedp2eft')}")
        return
    name, *rest = arguments
    groups = {command.split()[0] for command in FUNCTIONS if " " in command}
    if name in groups:
        _group(name, rest)
    elif name in FUNCTIONS:
        _call(name, rest)
    elif name == "quickstart":
        _quickstart(rest)
    elif name in EXPERIMENTS:
        _experiment(name, rest)
    else:
        known = list(dict.fromkeys([*EXPERIMENTS, *(each.split()[0] for each in FUNCTIONS)]))
        hint = nearest(name, known)
        raise UserError(f"There is no command {name!r}.{hint} Known: {', '.join(known)}.")


def _call(command: str, options: list[str]) -> None:
    """Parse the options of a command's function and call it."""
    from fedp2eft.settings.options import Parser

    function = function_of(command)
    parser = Parser(prog=f"fedp2eft {command}", description=_summary(function))
    parser.add_function(function, positional=command in POSITIONAL)
    function(**parser.instantiate_classes(parser.parse_args(options)).as_dict())


def _quickstart(options: list[str]) -> None:
    from fedp2eft.commands.run import quickstart

    run, watch, rest = _split("quickstart", options, quickstart)
    quickstart(run or "runs/quickstart", rest, watch)


def _experiment(name: str, options: list[str]) -> None:
    function = function_of(name)
    if options and not options[0].startswith("-"):
        run, watch, rest = _split(f"{name} CONFIG", options[1:], function)
        function(options[0], run, rest, watch)
        return
    _split(f"{name} CONFIG", options, function)
    raise UserError(f"Name the experiment's YAML file: fedp2eft {name} CONFIG [--run DIR].")


def _split(
    usage: str, options: list[str], function: Callable[..., None]
) -> tuple[str | None, bool, list[str]]:
    """Split --run and --watch from the options; the rest override the file's settings."""
    from fedp2eft.settings.options import Parser, settings_parser

    if "-h" in options or "--help" in options:
        parser = Parser(prog=f"fedp2eft {usage}", description=_summary(function))
        parser.add_argument("--run", metavar="DIR", help="the run folder")
        parser.add_argument("--watch", action="store_true", help=WATCH_HELP)
        settings_parser(parser).print_help()
        raise SystemExit(0)
    rest, run, watch = [], None, False
    words = iter(options)
    for word in words:
        if word == "--run":
            run = next(words, "")
        elif word.startswith("--run="):
            run = word.removeprefix("--run=")
        elif word == "--watch":
            watch = True
        else:
            rest.append(word)
    if run == "":
        raise UserError("--run needs a folder: --run runs/NAME.")
    return run, watch, rest


def _group(name: str, options: list[str]) -> None:
    """Run a command of a group: fedp2eft data describe."""
    known = [command.split()[1] for command in FUNCTIONS if command.startswith(f"{name} ")]
    if not options or options[0] in ("-h", "--help"):
        print(GROUP_HELP[name], end="")
        return
    if options[0] not in known:
        hint = nearest(options[0], known)
        raise UserError(f"There is no '{name} {options[0]}'.{hint} Known: {', '.join(known)}.")
    _call(f"{name} {options[0]}", options[1:])


def _summary(function: Callable[..., None]) -> str:
    return (function.__doc__ or "").split("Args:")[0].strip()
