"""The one exception that a user's mistake, or broken input, raises."""


class UserError(Exception):
    """Something that the user can mend: a file, a setting, a peer's reply.

    The message is a single line that says what is wrong and what to do. The command line prints it
    without a traceback and exits with status 2; a library user catches it like any exception.
    """


class InterruptedRunError(UserError):
    """The user stopped the command; the message says how to go on."""


def nearest(word: str, known: list[str]) -> str:
    """`" Did you mean 'x'?"` for the known word closest to `word`, or an empty string."""
    from difflib import get_close_matches

    close = get_close_matches(word, known, n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""
