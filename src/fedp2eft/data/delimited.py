"""CSV, TSV and what spreadsheets write: the delimiter and the quoting are found, never assumed."""

import csv
import io
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedp2eft.errors import UserError

DELIMITERS = {
    ",": "comma-separated",
    "\t": "tab-separated",
    ";": "semicolon-separated",
    "|": "pipe-separated",
}
Columns = dict[str, list[Any]]
Record = tuple[int, list[str]]
"""The line that a row begins in, from 1, and its fields."""
Select = Callable[[Sequence[str]], dict[str, str]]
"""The columns of a file -> those to keep: the caller's name of each -> the file's."""


def clean(name: str) -> str:
    """Return a word in NFC without blanks and invisible marks around it."""
    return unicodedata.normalize("NFC", name).strip(" \t\r\n\xa0\ufeff\u200b\u2060").strip()


@dataclass(frozen=True)
class Table:
    """A file's columns.

    Attributes:
        path: the file.
        columns: name -> one value per row.
        lines: the line that each row begins in, from 1; None where the file has no lines.
        form: delimiter and quoting of a delimited file, else "".
    """

    path: Path
    columns: Columns
    lines: Sequence[int] | None = None
    form: str = ""

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def where(self, row: int) -> str:
        """Return the place of a row (from 0) for a message: `rows.csv, line 7`."""
        if self.lines is None:
            return f"{self.path}, row {row + 1}"
        return f"{self.path}, line {self.lines[row]}"


def read_delimited(
    path: Path,
    text: str,
    select: Select,
    needed: Sequence[str],
    usual: str,
    quoted: bool | None = None,
) -> Table:
    """Read delimited text whose first row names the columns.

    The delimiter is the one that Excel's first line `sep=;` names, else the one by which the header
    has the columns that are needed. Fields are quoted as RFC 4180 says; tab-separated fields are
    not, where reading them so would lose a part of the text (see `_without_quotes`). Columns
    without a name, and rows of empty fields, are what spreadsheets leave behind: they are skipped.

    Args:
        path: for messages.
        text: the file's content.
        select: the columns to keep, of those that the header names.
        needed: the columns by which the delimiter is found.
        usual: the delimiter that the file's ending stands for.
        quoted: whether fields of a tab-separated file are quoted; None: found.

    Raises:
        UserError: two columns of one name, a row of another length, a quote that is not closed.
    """
    csv.field_size_limit(2**31 - 1)  # the module's own limit is 131,072 characters a field
    # Spreadsheets may put a line "sep=;" first; old Macs end lines with a carriage return.
    declared = re.match(r'"?sep=(.)"?\r?\n', text, re.IGNORECASE)
    first = 1 + (declared is not None)
    if declared:
        text = text[declared.end() :]
    if "\n" not in text:
        text = text.replace("\r", "\n")
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    at = next((number for number, line in enumerate(lines) if line.strip()), None)
    if at is None:
        raise UserError(f"{path} has no rows: add at least one.")
    # Choose the delimiter by the header, and quoting by the rows.
    delimiter = declared.group(1) if declared else _delimiter(lines[at], needed, usual)
    loose = f"{delimiter} " in lines[at]
    if delimiter != "\t":
        quoted = True
    elif quoted is None:
        quoted = not _without_quotes([line for line in lines if line.strip()])
    if quoted:
        records = _quoted(path, text, delimiter, first, loose)
    else:
        records = ((first + n, line.split("\t")) for n, line in enumerate(lines) if line.strip())
    # An old copy of a header may have a blank behind a delimiter or a mark before a name.
    header = [clean(name) for name in next(records)[1]]
    named = [name for name in header if name]
    kept = select(named)
    for name in kept.values():
        if named.count(name) > 1:
            raise UserError(f"{path}: two columns have the same name: {name}.")
    # Rows may be longer than the header by empty fields only.
    width = max((number for number, name in enumerate(header, 1) if name), default=0)
    what = DELIMITERS.get(delimiter, f"separated by {delimiter!r}")
    places = {name: header.index(own) for name, own in kept.items()}
    columns: Columns = {name: [] for name in kept}
    starts = []
    for line, row in records:
        if not any(field.strip() for field in row):
            continue
        if len(row) < width or any(field.strip() for field in row[width:]):
            mark = "a tab" if delimiter == "\t" else repr(delimiter)
            raise UserError(
                f"{path}, line {line}: {len(row)} fields where the header names {width} ({what}). "
                f"Quote a field that holds {mark} or a line break."
            )
        starts.append(line)
        for name, place in places.items():
            columns[name].append(row[place])
    if '"' in text:
        what += ", quoted" if quoted else ", not quoted"
    return Table(path, columns, starts, what)


def _delimiter(header: str, needed: Sequence[str], usual: str) -> str:
    """Return the delimiter by which a header has the needed columns, else the most names."""
    order = [usual, *(other for other in DELIMITERS if other != usual)]
    names = {mark: [clean(n.strip().strip('"')) for n in header.split(mark)] for mark in order}
    wanted = {clean(name) for name in needed}
    for mark in order:
        if wanted and wanted <= set(names[mark]):
            return mark
    return max(order, key=lambda mark: len(names[mark]))


def _without_quotes(lines: Sequence[str]) -> bool:
    """Return whether quotes at a field's ends belong to the text, in a tab-separated file.

    A line of another length than the header's can only be explained by quotes around a tab or a
    line break. Else they are the writer's only if each such field is whole and doubles its inner
    marks, and either none is there without need or a column has them in all rows.
    """
    rows = [line.split("\t") for line in lines]
    width = len(rows[0])
    if any(len(row) < width or any(map(str.strip, row[width:])) for row in rows):
        return False
    marked = [field for row in rows for field in row if field.startswith('"')]
    if not all(re.fullmatch(r'"(?:[^"]|"")*"', field) for field in marked):
        return True
    if all('"' in field[1:-1] for field in marked):
        return not marked
    places = {n for row in rows[1:] for n, field in enumerate(row) if field.startswith('"')}
    return not all(row[place].startswith('"') for row in rows[1:] for place in places)


def _quoted(path: Path, text: str, delimiter: str, first: int, loose: bool) -> Iterator[Record]:
    """Yield the rows of text quoted as RFC 4180 says."""
    lines = io.StringIO(text, newline="")
    reader = csv.reader(lines, delimiter=delimiter, strict=True, skipinitialspace=loose)
    start = first
    try:
        for row in reader:
            if row:
                yield start, row
            start = first + reader.line_num
    except csv.Error as error:
        cause = (
            "a quotation mark that opens here is not closed, or the file is cut off"
            if "unexpected end" in str(error)
            else "a quotation mark within a quoted field is not doubled"
        )
        raise UserError(
            f"{path}, line {start}: {cause} ({DELIMITERS.get(delimiter, delimiter)})."
        ) from None
