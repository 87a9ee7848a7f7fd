"""The command line: every command is one function whose signature is its options."""

from __future__ import annotations

import codecs
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from fedp2eft.commands.catalogue import COMMANDS, GROUPS, function_of, overview, parser_of
from fedp2eft.commands.warned import show_what_concerns_results
from fedp2eft.errors import InterruptedRunError, UserError, nearest


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit status.

    0: done. 2: a `UserError`, printed in one line. 130: interrupted.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    # bitsandbytes warns at import about a faster kernel that it could fetch, needed or not.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if not sys.warnoptions:
        show_what_concerns_results()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Waiting threads spin only briefly before they yield their core: next to other processes, long
    # spinning makes every step several times slower, and no spinning wastes the second core.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    _write_what_the_terminal_knows()
    pressed: list[int] = []
    try:
        with _noting(pressed):
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
    except Exception:
        if not pressed:
            raise
        # A library that is interrupted while it is imported may raise an error of its own instead.
        print("fedp2eft: Interrupted.", file=sys.stderr)
        return 130
    return 0


@contextmanager
def _noting(pressed: list[int]) -> Iterator[None]:
    """Note every Ctrl-C, which raises KeyboardInterrupt as before."""
    usual = signal.getsignal(signal.SIGINT)
    main_thread = threading.current_thread() is threading.main_thread()
    if not main_thread or usual is not signal.default_int_handler:
        yield
        return

    def note(number: int, frame: FrameType | None) -> None:
        pressed.append(number)
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)


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


def _dispatch(words: list[str]) -> None:
    if not words or words[0] in ("-h", "--help"):
        print(overview(), end="")
    elif words[0] == "--version":
        from importlib.metadata import version

        print(f"fedp2eft {version('fedp2eft')}")
    elif words[0] in GROUPS and words[1:2] in ([], ["-h"], ["--help"]):
        print(overview(words[0]), end="")
    else:
        function, arguments = parsed(words)
        function(**arguments)


def parsed(words: list[str]) -> tuple[Callable[..., None], dict[str, Any]]:
    """Return the function that a command line calls, and its arguments.

    Raises:
        UserError: An unknown command or option, or a value of another type.
    """
    count = 2 if words[0] in GROUPS else 1
    command, rest = " ".join(words[:count]), words[count:]
    if command not in COMMANDS:
        hint = nearest(command, list(COMMANDS))
        raise UserError(f"There is no command {command!r}.{hint} Known: {', '.join(COMMANDS)}.")
    return function_of(command), parser_of(command).arguments(rest)
