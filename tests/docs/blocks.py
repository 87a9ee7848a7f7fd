"""The code blocks of a Markdown page, in order."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

MARKER = re.compile(r"<!-- not run: (.+?) -->\s*$", re.S)


@dataclass(frozen=True)
class Block:
    """One block.

    Args:
        where: File and line.
        language: What its fence says; "" for an indented block.
        text: Its lines.
        reason: Why it is left out, from `<!-- not run: … -->` right before it; "" to run it.
    """

    where: str
    language: str
    text: str
    reason: str = ""


def blocks_of(page: Path) -> Iterator[Block]:
    """All blocks of a page; Sphinx's own directives ({toctree}, {eval-rst}) are none."""
    reason = ""
    for token in MarkdownIt().parse(page.read_text(encoding="utf-8")):
        if token.type in ("fence", "code_block"):
            where = f"{page.name}:{token.map[0] + 1}" if token.map else page.name
            language = token.info.split()[0] if token.info.split() else ""
            if not language.startswith("{"):
                yield Block(where, language, token.content, reason)
        marked = MARKER.search(token.content) if token.type == "html_block" else None
        reason = " ".join(marked[1].split()) if marked else ""


def commands_of(script: str) -> Iterator[list[str]]:
    """The simple commands of a shell script, as words; variables are left as they are."""
    for line in script.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;")
        lexer.whitespace_split = True
        command: list[str] = []
        for word in lexer:
            if word and set(word) <= set("|&;"):
                yield command
                command = []
            else:
                command.append(word)
        while command and re.fullmatch(r"[A-Z0-9_]+=.*", command[0]):
            command = command[1:]
        if command:
            yield command
