"""Reading a user's table: JSON lines, CSV or Parquet, into memory, every fault one clear line.

The files are read here rather than by the `datasets` builders, which leave a cache behind and
report a broken row as a traceback.
"""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedp2eft.errors import UserError, nearest

if TYPE_CHECKING:
    from datasets import Dataset

Columns = dict[str, list[Any]]
KINDS = (".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz", ".json.gz", ".csv.gz")


def read_table(
    path: str | Path,
    *,
    text_columns: Sequence[str] = (),
    columns: Sequence[str] | None = None,
    optional: Sequence[str] = (),
) -> "Dataset":
    """Read a JSON-lines, CSV or Parquet file (the first two also gzipped) into memory.

    Every row of a CSV file is text, and an empty field is an empty string. Blank lines of a JSON
    file are skipped; a key that a row lacks is None.

    Args:
        path: the file; its ending says what it is.
        text_columns: columns that must be there and hold text, not blank, in every row.
        columns: further columns that must be there; None keeps every column of the file.
        optional: columns to keep where the file has them.

    Raises:
        UserError: no such file, a directory, an unknown ending, empty, cut off, not UTF-8, a row
            that cannot be read, a missing column, a text that is missing or no text, no rows.
    """
    import pyarrow as pa
    from datasets import Dataset

    path = Path(path)
    needed = [*text_columns, *(columns or ())]

    def select(names: Sequence[str]) -> list[str]:
        for name in needed:
            if name not in names:
                raise UserError(
                    f"{path} has no column {name!r}.{nearest(name, list(names))} "
                    f"It has {', '.join(names) or 'none'}."
                )
        if columns is None:
            return list(names)
        return list(dict.fromkeys([*needed, *(name for name in optional if name in names)]))

    data = _reader(path)(path, select)
    if not any(data.values()):
        raise UserError(f"{path} has no rows: add at least one.")
    for name in text_columns:
        check_text(path, name, data[name])
    arrays = {}
    for name, values in data.items():
        try:
            arrays[name] = pa.array(values)
        except (pa.ArrowException, UnicodeError, OverflowError) as error:
            raise UserError(
                f"{path}: column {name!r} mixes kinds of values ({first_line(error)}). "
                "Give every row the same kind."
            ) from None
    return Dataset(pa.table(arrays))


def check_text(source: str | Path, column: str, values: Sequence[Any]) -> None:
    """Raise a UserError that names `source` and the first row (from 1) that is not text."""
    for row, value in enumerate(values, start=1):
        if isinstance(value, str) and value.strip():
            continue
        found = "nothing" if value is None else "blank text"
        if value is not None and not isinstance(value, str):
            found = f"{type(value).__name__} {str(value)[:40]!r}"
        raise UserError(
            f"{source}, row {row}: column {column!r} holds {found}, not text. "
            "Mend or remove the row."
        )


def _reader(path: Path) -> Callable[[Path, Callable[[Sequence[str]], list[str]]], Columns]:
    if path.is_dir():
        raise UserError(f"{path} is a directory: name a file in it.")
    if not path.exists():
        raise UserError(f"{path} does not exist: check the path.")
    name = path.name.lower().removesuffix(".gz")
    if name.endswith((".jsonl", ".json")):
        return _read_json_lines
    if name.endswith(".csv"):
        return _read_csv
    if path.name.lower().endswith(".parquet"):
        return _read_parquet
    raise UserError(f"{path} has no known ending: name it {', '.join(KINDS)}.")


def _read_text(path: Path) -> str:
    try:
        raw = path.read_bytes()
        if raw and path.name.lower().endswith(".gz"):
            raw = gzip.decompress(raw)
    except EOFError:
        raise UserError(f"{path} is cut off: its gzip stream has no end. Copy it again.") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is not a sound gzip file ({first_line(error)}).") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from None
    if not raw.strip():
        raise UserError(f"{path} is empty: write at least one row.")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path} is not UTF-8: byte 0x{raw[error.start]:02x} in line {line} "
            f"(byte {error.start} of the file). Save it as UTF-8."
        ) from None


def _read_json_lines(path: Path, select: Callable[[Sequence[str]], list[str]]) -> Columns:
    # Only \n and \r\n end a line here: str.splitlines would also cut at U+2028 within a text.
    rows: list[dict[str, Any]] = []
    names: dict[str, None] = {}
    lines = _read_text(path).split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            last = number == len(lines)
            hint = " The file looks cut off: copy it again." if last else " Mend that line."
            raise UserError(
                f"{path}, line {number}: not a JSON object ({first_line(error)}).{hint}"
            ) from None
        if not isinstance(row, dict):
            raise UserError(
                f"{path}, line {number}: a JSON {type(row).__name__}, not an object. "
                'Write one row a line: {"text": "...", "label": "..."}.'
            )
        names |= dict.fromkeys(row)
        rows.append(row)
    return {name: [row.get(name) for row in rows] for name in select(list(names))}


def _read_csv(path: Path, select: Callable[[Sequence[str]], list[str]]) -> Columns:
    reader = csv.reader(io.StringIO(_read_text(path), newline=""), strict=True)
    try:
        header = next(reader)
        if len(set(header)) < len(header):
            raise UserError(f"{path}: two columns have the same name: {', '.join(header)}.")
        kept = [header.index(name) for name in select(header)]
        data: Columns = {header[index]: [] for index in kept}
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                raise UserError(
                    f"{path}, line {reader.line_num}: {len(row)} fields where the header names "
                    f"{len(header)}. Quote a text that holds a comma or a line break."
                )
            for index in kept:
                data[header[index]].append(row[index])
    except csv.Error as error:
        raise UserError(
            f"{path}, line {reader.line_num}: {first_line(error)}. "
            "Is a quote not closed, or the file cut off?"
        ) from None
    return data


def _read_parquet(path: Path, select: Callable[[Sequence[str]], list[str]]) -> Columns:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty: write at least one row.")
    try:
        with pq.ParquetFile(path) as file:
            names = select(file.schema_arrow.names)
            table = file.read(columns=names)
        return {name: table.column(name).to_pylist() for name in names}
    except (pa.ArrowException, OSError, UnicodeError) as error:
        raise UserError(
            f"{path} is not a whole Parquet file ({first_line(error)}). Copy or write it again."
        ) from None


def first_line(error: BaseException) -> str:
    """The first line of another library's message, without its closing full stop."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(". ")
