"""Docstrings are written for readers of the source, in Markdown's manner; Sphinx reads RST."""

from __future__ import annotations

import re
from itertools import groupby
from typing import Any

from sphinx.application import Sphinx

CODE = re.compile(r"(``[^`]+``|`[^`]+`)")


def to_rst(lines: list[str]) -> list[str]:
    """Code in single backticks, formulas and tables as they stand, and signs that RST reads."""
    made: list[str] = []
    for empty, group in groupby(lines, key=lambda line: not line.strip()):
        paragraph = list(group)
        indents = [len(line) - len(line.lstrip()) for line in paragraph]
        columns = [re.match(r"\s*\S.*?\S  +\S|   +\S", line) for line in paragraph]
        if empty:
            made += paragraph
        elif indents[0] >= 4:  # a formula: an indented block after an empty line
            made += ["::", "", *paragraph]
        elif len(paragraph) > 2 and sum(map(bool, columns)) > 0.8 * len(paragraph):  # columns
            made += ["::", "", *[f"    {line}" for line in paragraph]]
        else:
            made += map(_plain, paragraph)
    return made


def _plain(line: str) -> str:
    parts = CODE.split(line)
    for number, part in enumerate(parts):
        if number % 2:
            parts[number] = f"``{part.strip('`')}``"
        else:
            parts[number] = re.sub(r"(?<!^)([*|])|^([*|])(?! )", r"\\\1\2", part)
    bullet = re.match(r"\s*\*\s", line)
    text = "".join(parts)
    return re.sub(r"^(\s*)\\\*\s", r"\1* ", text) if bullet else text


def _process(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = to_rst(lines)


def setup(app: Sphinx) -> dict[str, bool]:
    """Rewrite docstrings before napoleon reads their sections."""
    app.connect("autodoc-process-docstring", _process, priority=400)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
