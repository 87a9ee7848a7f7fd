"""A local copy of a data set of the hub: a folder per language, as the hub or its authors lay it.

`<language>/train.parquet`, `<language>/train-00000-of-00001.parquet` and
`<language>/train/0000.parquet` are the hub's ways, `<language>/train.tsv, dev.tsv, test.tsv` is the
authors'. The folders of the languages may stand in the folder itself or up to two levels below it
(`data/hau`, `data/annotated/hau_Latn`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedp2eft.data.clients import Indices
from fedp2eft.data.delimited import Columns, Table, clean
from fedp2eft.data.known import HubSource
from fedp2eft.data.table import KINDS, PACKED, read_columns
from fedp2eft.errors import UserError, nearest

SPLITS = {
    "train": ("train",),
    "validation": ("validation", "dev", "valid", "val"),
    "test": ("test",),
}
"""A split's name on the hub -> what its files are called."""


@dataclass(frozen=True)
class Split:
    """Rows of one language and split of a copy, and where each stands.

    Attributes:
        columns: name -> one value per row.
        tables: the files that they come from.
        ids: what names each row's sentence; None where nothing does.
        names: class names that the files bring: none, as the classes of a copy are words.
    """

    columns: Columns
    tables: tuple[Table, ...]
    ids: list[Any] | None
    names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return sum(map(len, self.tables))

    @property
    def form(self) -> str:
        """Return delimiter and quoting of the first file."""
        return self.tables[0].form

    def take(self, rows: Indices) -> Columns:
        """Return those rows; None where a row holds nothing."""
        return {name: [values[row] for row in rows] for name, values in self.columns.items()}

    def sentences(self) -> list[str] | None:
        """Return what names each row's sentence; None where nothing does."""
        return None if self.ids is None else list(map(str, self.ids))

    def where(self, row: int) -> str:
        """Return the place of a row (from 0) for a message."""
        for table in self.tables:
            if row < len(table):
                return table.where(row)
            row -= len(table)
        raise IndexError(row)


@dataclass(frozen=True)
class LocalCopy:
    """A folder that holds one folder per language.

    Attributes:
        folder: where it lies.
        source: columns and splits of the data set on the hub, and what copies call them.
    """

    folder: Path
    source: HubSource

    def languages(self) -> tuple[str, ...]:
        """Return the languages that the copy has test rows of, sorted."""
        return tuple(sorted({home.name for home in self._homes("*") if _files(home, "test")}))

    def splits(self, language: str, split: str) -> tuple[str, ...]:
        """Return those parts of a split ("train+validation") that a language has files of."""
        home = self._home(language)
        return tuple(part for part in split.split("+") if _files(home, part))

    def read(self, language: str, split: str) -> Split:
        """Read a language's split, or several joined by "+".

        Args:
            language: the folder's name.
            split: "train", "validation", "test", or several.

        Raises:
            UserError: the copy lacks the language, the split or a column, or as `read_columns`.
        """
        home = self._home(language)
        tables = []
        for part in split.split("+"):
            files = _files(home, part)
            if not files:
                raise UserError(
                    f"{home} has no file of the split {part}: name it "
                    f"{SPLITS.get(part, (part,))[-1]}.tsv or {part}.parquet."
                )
            tables += [
                _renamed(read_columns(file, quoted=self.source.quoted), self.source)
                for file in files
            ]
        shared = [n for n in tables[0].columns if all(n in table.columns for table in tables)]
        joined = {name: [v for table in tables for v in table.columns[name]] for name in shared}
        ids = joined.pop(self.source.row_id or "", None)
        return Split(joined, tuple(tables), ids)

    def _homes(self, language: str) -> Iterator[Path]:
        if not self.folder.is_dir():
            raise UserError(f"{self.folder} is not a folder: name the data set's own.")
        for above in ("", "*/", "*/*/"):
            for home in sorted(self.folder.glob(above + language)):
                if home.is_dir() and any(_files(home, split) for split in SPLITS):
                    yield home

    def _home(self, language: str) -> Path:
        homes = list(self._homes(language))
        if not homes:
            has = self.languages()
            raise UserError(
                f"{self.folder} has no folder of the language {language!r}."
                f"{nearest(language, list(has))} It has {', '.join(has) or 'none'}."
            )
        if len(homes) > 1:
            raise UserError(
                f"{self.folder} has two folders of {language}, {homes[0]} and {homes[1]}: name the "
                "folder above the one that you mean."
            )
        return homes[0]


def _files(home: Path, split: str) -> list[Path]:
    """Return a split's file, or the shards of one, in order."""
    words = SPLITS.get(split, (split,))
    found = []
    for path in sorted(home.iterdir()):
        name = path.name.lower()
        if path.is_dir() and name in words:
            found.append(sorted(filter(_is_table, path.iterdir())))
        elif _is_table(path) and name.split(".")[0] in words:
            found.append([path])
    shards = [path for path in sorted(home.iterdir()) if _is_table(path)
              and path.name.lower().startswith(tuple(f"{word}-" for word in words))]  # fmt: skip
    found = [files for files in (*found, shards) if files]
    if len(found) > 1:
        raise UserError(
            f"{home} has the split {split} twice, {found[0][0].name} and {found[1][0].name}: "
            "remove one."
        )
    return found[0] if found else []


def _is_table(path: Path) -> bool:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
    return bool(suffixes) and suffixes[-1] in KINDS and path.is_file()


def _renamed(table: Table, source: HubSource) -> Table:
    """Return a file's columns under the names that they have on the hub."""
    own = {clean(name): values for name, values in table.columns.items()}
    made: Columns = {}
    for name in source.columns:
        ways = [(name,), *source.other_names.get(name, ())]
        way = next((way for way in ways if set(way) <= set(own)), None)
        if way is None:
            said = " or ".join(" with ".join(map(repr, way)) for way in ways)
            raise UserError(
                f"{table.path} has no column {said}.{nearest(name, list(own))} "
                f"It has {', '.join(own)}."
            )
        parts = [own[part] for part in way]
        made[name] = parts[0] if len(way) == 1 else list(map(_joined, *parts))
    if source.row_id in own:
        made[source.row_id] = own[source.row_id]
    return Table(table.path, made, table.lines, table.form)


def _joined(*parts: Any) -> Any:
    """Return the parts of a row as one text; None where one is blank or no text."""
    if all(isinstance(part, str) and part.strip() for part in parts):
        return " ".join(parts)
    return None
