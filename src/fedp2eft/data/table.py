"""Reading a user's table: JSON, CSV, TSV or Parquet, into memory, every fault one clear line.

The files are read here rather than by the `datasets` builders, which leave a cache behind and
report a broken row as a traceback.
"""

import bz2
import gzip
import json
import lzma
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedp2eft.data.delimited import Columns, Select, Table, clean, read_delimited
from fedp2eft.errors import UserError, first_line, nearest

if TYPE_CHECKING:
    from datasets import Dataset

KINDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
PACKED: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.decompress,
    ".bz2": bz2.decompress,
    ".xz": lzma.decompress,
}
MAGIC = {
    b"PK\x03\x04": "a ZIP archive or an Excel workbook: unpack it, or save it as CSV UTF-8",
    b"\x28\xb5\x2f\xfd": "packed with zstd: unpack it, or pack it with gzip",
    b"\x1f\x8b": "packed with gzip: give it the ending .gz as well",
    b"BZh": "packed with bzip2: give it the ending .bz2 as well",
    b"\xfd7zXZ": "packed with xz: give it the ending .xz as well",
    b"PAR1": "a Parquet file: give it the ending .parquet",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook: save it as CSV UTF-8",
}
"""How files begin that are often given another ending than their own."""


def read_columns(
    path: str | Path,
    *,
    text_columns: Sequence[str] = (),
    columns: Sequence[str] | None = None,
    optional: Sequence[str] = (),
    quoted: bool | None = None,
) -> Table:
    """Read a JSON, CSV, TSV or Parquet file, or a folder of Parquet files, into memory.

    All but Parquet may be packed with gzip, bzip2 or xz. Every value of a delimited file is text,
    and an empty field is an empty string (see `read_delimited`). A JSON file has one object per
    line, or is one list of objects; a key that a row lacks is None. Class ids of a Parquet file
    that the `datasets` library wrote come as the names that it carries.

    Args:
        path: the file; its ending says what it is; `~` is the home folder.
        text_columns: columns that must be there and hold text, not blank, in every row.
        columns: further columns that must be there; None keeps every column of the file.
        optional: columns to keep where the file has them.
        quoted: see `read_delimited`.

    Raises:
        UserError: no such file, an unknown ending, empty, cut off, not UTF-8, a row that cannot be
            read, a missing column, a text that is missing or no text, no rows.
    """
    path = Path(path).expanduser()
    needed = [*text_columns, *(columns or ())]

    def select(names: Sequence[str]) -> dict[str, str]:
        own = {clean(name): name for name in reversed(names)}
        for name in needed:
            if clean(name) not in own:
                raise UserError(
                    f"{path} has no column {name!r}.{nearest(name, list(names))} "
                    f"It has {', '.join(names) or 'none'}."
                )
        if columns is None:
            return {name: name for name in names}
        wanted = dict.fromkeys([*needed, *(name for name in optional if clean(name) in own)])
        return {name: own[clean(name)] for name in wanted}

    table = _read(path, select, needed, quoted)
    if not len(table):
        raise UserError(f"{path} has no rows: add at least one.")
    for name in text_columns:
        check_text(table, name)
    return table


def read_table(path: str | Path, text_columns: Sequence[str] = ()) -> "Dataset":
    """Return `read_columns` as an Arrow data set, whose columns each hold one kind of value."""
    import pyarrow as pa
    from datasets import Dataset

    table = read_columns(path, text_columns=text_columns)
    arrays = {}
    for name, values in table.columns.items():
        try:
            arrays[name] = pa.array(values)
        except (pa.ArrowException, UnicodeError, OverflowError) as error:
            raise UserError(
                f"{path}: column {name!r} mixes kinds of values ({first_line(error)}). "
                "Give every row the same kind."
            ) from None
    return Dataset(pa.table(arrays))


def check_text(table: Table, column: str) -> None:
    """Raise a UserError that names the first row that is not text, or half a character."""
    for row, value in enumerate(table.columns[column]):
        if isinstance(value, str) and value.strip():
            try:
                value.encode()
                continue
            except UnicodeEncodeError:
                found = "half a character (a lone surrogate)"
        elif value is None:
            found = "nothing"
        else:
            found = f"{type(value).__name__} {str(value)[:40]!r}"
            found = "blank text" if isinstance(value, str) else found
        raise UserError(
            f"{table.where(row)}: column {column!r} holds {found}, not text. Fix or remove the row."
        )


def _read(path: Path, select: Select, needed: Sequence[str], quoted: bool | None) -> Table:
    """Read a file by its ending."""
    if path.is_dir():
        shards = sorted(path.glob("*.parquet"))
        if not shards:
            raise UserError(f"{path} is a directory without Parquet files: name a file in it.")
        parts = [_read_parquet(shard, select) for shard in shards]
        names = [name for name in parts[0] if all(name in part for part in parts)]
        return Table(path, {name: [v for part in parts for v in part[name]] for name in names})
    if not path.exists():
        raise UserError(f"{path} does not exist: check the path.")
    suffixes = [suffix.lower() for suffix in path.suffixes]
    unpack = PACKED.get(suffixes[-1]) if suffixes else None
    ending = suffixes[-2:-1] if unpack else suffixes[-1:]
    kind = ending[0] if ending else ""
    if kind == ".parquet" and unpack is None:
        return Table(path, _read_parquet(path, select))
    if kind in (".jsonl", ".json"):
        return _read_json(path, read_text(path, unpack), select)
    if kind in (".csv", ".tsv"):
        usual = "\t" if kind == ".tsv" else ","
        text = read_text(path, unpack)
        return read_delimited(path, text, select, needed, usual, quoted)
    packed = ", ".join(PACKED)
    raise UserError(
        f"{path} has no known ending: name it {', '.join(KINDS)} (all but the last also with "
        f"{packed})."
    )


def read_text(path: Path, unpack: Callable[[bytes], bytes] | None = None) -> str:
    """Return a file's text: UTF-8, or UTF-16 where a byte order mark says so."""
    try:
        raw = path.read_bytes()
        if raw and unpack:
            raw = unpack(raw)
    except EOFError:
        raise UserError(
            f"{path} is cut off: its {path.suffix[1:]} stream has no end. Copy it again."
        ) from None
    except (gzip.BadGzipFile, zlib.error, lzma.LZMAError, ValueError) as error:
        raise UserError(
            f"{path} is not a valid {path.suffix[1:]} file ({first_line(error)}). Copy it again."
        ) from None
    except OSError as error:
        cause = error.strerror or first_line(error)
        raise UserError(f"{path} cannot be read: {cause}.") from None
    for start, what in MAGIC.items():
        if raw.startswith(start):
            raise UserError(f"{path} is {what}.")
    wide = raw.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        text = raw.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path} is not {'UTF-16' if wide else 'UTF-8'}: byte 0x{raw[error.start]:02x} in line "
            f"{line} (byte {error.start} of the file). Save it as UTF-8."
        ) from None
    if not text.strip():
        raise UserError(f"{path} is empty: write at least one row.")
    return text


def _read_json(path: Path, text: str, select: Select) -> Table:
    """Read JSON lines, or one list of objects."""
    rows, lines = _json_list(path, text), None
    if rows is None:
        rows, lines = _json_lines(path, text)
    names: dict[str, None] = {}
    for row in rows:
        names |= dict.fromkeys(row)
    if len(rows) == 1 and all(isinstance(value, list | dict) for value in rows[0].values()):
        raise UserError(
            f"{path} holds one object of columns, not rows: write one object per row, as pandas "
            "does with orient='records', lines=True."
        )
    kept = select(list(names))
    columns = {name: [row.get(own) for row in rows] for name, own in kept.items()}
    return Table(path, columns, lines)


def _json_list(path: Path, text: str) -> list[dict[str, Any]] | None:
    """Return the objects of a file that is one JSON list; None if it is not."""
    if not text.lstrip().startswith("["):
        return None
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        if first_line(error).startswith("Extra data"):
            return None
        raise UserError(
            f"{path} starts like a JSON list but is not complete ({first_line(error)}). "
            "Copy it again."
        ) from None
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise UserError(f"{path}, row {number}: a JSON {type(row).__name__}, not an object.")
    return list(rows)


def _json_lines(path: Path, text: str) -> tuple[list[dict[str, Any]], list[int]]:
    # Only \n, \r\n and \r end a line here: str.splitlines would also cut at U+2028 within a text.
    rows: list[dict[str, Any]] = []
    numbers = []
    lines = re.split(r"\r\n|\n|\r", text)
    last = max(number for number, line in enumerate(lines, start=1) if line.strip())
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            hint = " Fix that line."
            if number == last and number > 1:
                hint = " The file looks cut off: copy it again."
            elif _is_json(text):
                hint = " The file is one object over several lines: write one row per line."
            raise UserError(
                f"{path}, line {number}: not a JSON object ({first_line(error)}).{hint}"
            ) from None
        if not isinstance(row, dict):
            raise UserError(
                f"{path}, line {number}: a JSON {type(row).__name__}, not an object. "
                'Write one row a line: {"text": "...", "label": "..."}.'
            )
        rows.append(row)
        numbers.append(number)
    return rows, numbers


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _read_parquet(path: Path, select: Select) -> Columns:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty: write at least one row.")
    try:
        with pq.ParquetFile(path) as file:
            kept = select(file.schema_arrow.names)
            table = file.read(columns=list(kept.values()))
            classes = _class_names(file.schema_arrow.metadata or {})
        columns = {name: table.column(own).to_pylist() for name, own in kept.items()}
    except (pa.ArrowException, OSError, UnicodeError) as error:
        raise UserError(
            f"{path} is not a complete Parquet file ({first_line(error)}). Copy or write it again."
        ) from None
    for name, own in kept.items():
        if names := classes.get(own):
            columns[name] = [
                names[v] if isinstance(v, int) and 0 <= v < len(names) else None
                for v in columns[name]
            ]
    return columns


def _class_names(metadata: Mapping[bytes, bytes]) -> dict[str, list[str]]:
    """Return column → class names, as the `datasets` library writes them into a Parquet file."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        return {
            name: [str(word) for word in kind["names"]]
            for name, kind in features.items()
            if isinstance(kind, dict) and kind.get("_type") == "ClassLabel"
        }
    except (KeyError, TypeError, ValueError):
        return {}
