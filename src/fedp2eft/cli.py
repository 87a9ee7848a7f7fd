"""The command line. Every command is one function whose signature is its options."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable

from fedp2eft.errors import InterruptedRunError, UserError, nearest

HELP = """\
usage: fedp2eft COMMAND [OPTIONS]

A federation learns which LoRA ranks each client needs, and every client leaves with its own PEFT
adapter.

  quickstart    run the whole main job on real text in a few minutes
  train         train base and PSG, then personalize and score every client
  compare       compute a table of methods, bases, ranks and seeds; several processes may share it
  personalize   fit one client's own adapter with a trained PSG
  evaluate      score a base model, with or without an adapter
  export        change the layout of an adapter: portable, compact or merged
  data          list, describe and partition data sets

fedp2eft COMMAND --help tells more. Start with: fedp2eft quickstart
"""
DATA_HELP = """\
usage: fedp2eft data list | describe | partition | build-libreoffice-help [OPTIONS]

  list          the data sets
  describe      clients, rows and labels of a data set as a federation would see them
  partition     write which rows are whose as readable JSON
  build-libreoffice-help
                make the whole of the data set libreoffice-help from Debian's packages
"""


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit status.

    0: done. 2: a mistake that the user can mend, said in one line. 130: interrupted.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    # It warns at import of a faster kernel that it could fetch, whether or not a run needs any.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # other libraries' advice to programmers; ours is logged
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Threads that wait spin only briefly before they give their core away: beside other work long
    # spinning makes every step several times slower, and none at all wastes the second core.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
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


def _dispatch(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP, end="")
        return
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(f"fedp2eft {version('fedp2eft')}")
        return
    name, *rest = arguments
    commands: dict[str, Callable[[list[str]], None]] = {
        "quickstart": _quickstart,
        "train": lambda options: _experiment("train", options),
        "compare": lambda options: _experiment("compare", options),
        "personalize": lambda options: _call("adapters", "personalize", options),
        "evaluate": lambda options: _call("adapters", "evaluate", options),
        "export": lambda options: _call("adapters", "export", options),
        "data": _data,
    }
    if name not in commands:
        hint = nearest(name, list(commands))
        raise UserError(f"There is no command {name!r}.{hint} Known: {', '.join(commands)}.")
    commands[name](rest)


def _call(module: str, name: str, options: list[str], prog: str = "") -> None:
    """Parse the options of a function and call it."""
    from importlib import import_module

    from fedp2eft.reading import Parser

    function = getattr(import_module(f"fedp2eft.commands.{module}"), name)
    parser = Parser(prog=prog or f"fedp2eft {name}", description=_summary(function))
    parser.add_function_arguments(function, as_group=False)
    function(**parser.instantiate_classes(parser.parse_args(options)).as_dict())


def _quickstart(options: list[str]) -> None:
    from fedp2eft.commands.run import quickstart

    run, rest = _split("quickstart", options, quickstart)
    quickstart(run or "runs/quickstart", rest)


def _experiment(name: str, options: list[str]) -> None:
    from fedp2eft.commands import run as commands

    function = getattr(commands, name)
    if options and not options[0].startswith("-"):
        run, rest = _split(f"{name} CONFIG", options[1:], function)
        function(options[0], run, rest)
        return
    _split(f"{name} CONFIG", options, function)
    raise UserError(f"Name the experiment's YAML file: fedp2eft {name} CONFIG [--run DIR].")


def _split(
    usage: str, options: list[str], function: Callable[..., None]
) -> tuple[str | None, list[str]]:
    """Take --run out of the options; the rest are settings, which are put on top of a file's."""
    from fedp2eft.reading import Parser, settings_parser

    if "-h" in options or "--help" in options:
        parser = Parser(prog=f"fedp2eft {usage}", description=_summary(function))
        parser.add_argument("--run", metavar="DIR", help="the run folder")
        settings_parser(parser).print_help()
        raise SystemExit(0)
    rest, run = [], None
    words = iter(options)
    for word in words:
        if word == "--run":
            run = next(words, "")
        elif word.startswith("--run="):
            run = word.removeprefix("--run=")
        else:
            rest.append(word)
    if run == "":
        raise UserError("--run needs a folder: --run runs/NAME.")
    return run, rest


def _data(options: list[str]) -> None:
    names = {
        "list": "list_datasets",
        "describe": "describe",
        "partition": "partition",
        "build-libreoffice-help": "build_libreoffice_help",
    }
    if not options or options[0] in ("-h", "--help"):
        print(DATA_HELP, end="")
        return
    if options[0] not in names:
        hint = nearest(options[0], list(names))
        raise UserError(f"There is no 'data {options[0]}'.{hint} Known: {', '.join(names)}.")
    _call("datasets", names[options[0]], options[1:], f"fedp2eft data {options[0]}")


def _summary(function: Callable[..., None]) -> str:
    return (function.__doc__ or "").split("Args:")[0].strip()
