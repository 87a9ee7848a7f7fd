"""Data sets of the Hugging Face Hub, or local copies: one part per language, halved into pools."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedp2eft.data.clients import NEW_LANGUAGE, SEEN, UNSEEN, ClientData, Indices
from fedp2eft.data.copies import LocalCopy, Split
from fedp2eft.data.delimited import Columns
from fedp2eft.data.known import CONVERTED, HubSource
from fedp2eft.data.labels import check_names, class_name, found_names
from fedp2eft.data.languages import choose_languages, new_languages_of
from fedp2eft.data.partition import distinct, partition_pools, rng_for
from fedp2eft.errors import UserError, first_line, nearest
from fedp2eft.settings.data import DataSettings

if TYPE_CHECKING:
    from datasets import Dataset


def load_hub_dataset(
    path: str,
    config: str | None = None,
    *,
    split: str = "train",
    columns: Sequence[str] | None = None,
    revision: str | None = None,
) -> "Dataset":
    """Load one split of a data set of the hub, through `datasets.load_dataset` and its cache.

    Args:
        path: repository, `owner/name`.
        config: configuration, often a language; on the branch `CONVERTED` a folder.
        split: split, or several joined by "+".
        columns: keep these, in this order; None: all.
        revision: branch, tag or commit.

    Raises:
        UserError: the hub is not reachable, or it has no such data set, configuration, split or
            column.
    """
    import datasets

    what = f"{path} ({config})" if config else path
    part = {"data_dir" if revision == CONVERTED else "name": config}
    try:
        table = datasets.load_dataset(path, split=split, revision=revision, **part)
    except ConnectionError as error:
        raise UserError(
            f"The hub is not reachable for {what} ({first_line(error)}): check the network, or use "
            "the data set that ships with the package, or a file."
        ) from None
    except RuntimeError as error:
        raise UserError(
            f"{what} cannot be loaded ({first_line(error)}): revision {CONVERTED} may help."
        ) from None
    except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
        raise UserError(f"{what}, split {split}, cannot be loaded ({first_line(error)}).") from None
    for name in columns or ():
        if name not in table.column_names:
            raise UserError(
                f"{what} has no column {name!r}.{nearest(name, table.column_names)} "
                f"It has {', '.join(table.column_names)}."
            )
    return table.select_columns(list(columns)) if columns else table


class _HubSplit:
    """Rows of one language and split on the hub."""

    form = ""

    def __init__(self, source: HubSource, language: str, split: str) -> None:
        self._label, self._what = source.label_column, f"{source.path} ({language}, {split})"
        self._table = load_hub_dataset(
            source.path, language, split=split, columns=source.columns, revision=source.revision
        )
        kind = self._table.features.get(self._label) if self._label else None
        self.names: tuple[str, ...] = tuple(getattr(kind, "names", None) or ())

    def __len__(self) -> int:
        return len(self._table)

    def take(self, rows: Indices) -> Columns:
        """Return those rows; class ids as names, None where a row holds nothing."""
        chosen: Columns = dict(self._table[rows.tolist()])
        if self.names and self._label:
            ids = chosen[self._label]
            chosen[self._label] = [None if v is None or v < 0 else self.names[v] for v in ids]
        return chosen

    def sentences(self) -> list[str] | None:
        """Return what names each row's sentence; None where nothing does."""
        return None

    def where(self, row: int) -> str:
        """Return the place of a row (from 0) for a message."""
        return f"{self._what}, row {row}"


_Rows = _HubSplit | Split


def load_hub(
    name: str, source: HubSource, settings: DataSettings, folder: Path | None = None
) -> ClientData:
    """Load a data set from the hub, partitioned as in the paper (arXiv 2502.04387, data protocol).

    Each language's train and test rows are halved into a seen and an unseen pool, cut to
    `pool_train` and `pool_test` rows, and split over its clients by label. The halves are drawn
    alike for every language, so that of a parallel data set (XNLI, SIB-200) no sentence is both
    seen and unseen, in any language.

    Args:
        name: the data set's name.
        source: where and what.
        settings: languages (by default all but the new ones and those without a train split), and
            how they are split; the seed decides the halves, too.
        folder: a local copy to read in place of the hub; see `LocalCopy`.

    Raises:
        UserError: as `load_hub_dataset`, `LocalCopy.read` and `partition_pools`; languages with
            other classes or, in a parallel data set, other sentences; a language without a train
            split that is not new; a row without text or class.
    """
    import datasets
    import pyarrow as pa

    # Which languages there are, on the hub or in the copy, and what each is for.
    copy = None if folder is None else LocalCopy(folder, source)
    known = source.languages if copy is None else copy.languages()
    new_languages = new_languages_of(name, known, settings)
    languages = settings.languages or [
        each for each in known if each not in new_languages and _can_train(source, copy, each)
    ]
    spoken, new = choose_languages(name, known, languages, new_languages)
    data: Columns = {}
    pools: dict[tuple[str, str], tuple[Indices, Indices]] = {}
    classes = source.labels
    first: dict[str, tuple[str, _Rows]] = {}
    notes: dict[str, list[str]] = {}
    # Halve each split of a language; the same order for all keeps parallel sentences in one pool.
    for language in (*spoken, *new):
        halves, texts = [], set[str]()
        for part, limit in (("train", source.pool_train), ("test", source.pool_test)):
            where = source.test_split
            if part == "train":
                where = _train_split(name, source, copy, language, language in new)
            rows: _Rows = copy.read(language, where) if copy else _HubSplit(source, language, where)
            classes = classes or rows.names
            if rows.names and set(rows.names) != set(classes):
                raise UserError(
                    f"{name}: the classes of {language} are {rows.names}, not {classes}."
                )
            if source.parallel:
                _check_parallel(name, language, rows, *first.setdefault(part, (language, rows)))
            for note in _notes(source, copy, part, where, rows):
                notes.setdefault(note, []).append(language)
            order = rng_for(settings.seed, "pools", part).permutation(len(rows))
            if settings.unique:
                chosen = rows.take(np.arange(len(rows)))
                [order] = distinct([chosen[c] for c in source.text_columns], order, seen=texts)
            middle = len(order) // 2
            halves.append(
                [
                    _append(data, rows, half[:limit], source, classes)
                    for half in (order[:middle], order[middle:])
                ]
            )
        # No client trains in a new language, so its seen half stays unused.
        (seen, unseen), (seen_test, unseen_test) = halves
        if language in new:
            pools[language, NEW_LANGUAGE] = (unseen, unseen_test)
        else:
            pools[language, SEEN] = (seen, seen_test)
            pools[language, UNSEEN] = (unseen, unseen_test)
    # One table for all; labels decide how a pool is split over its clients.
    table = datasets.Dataset(pa.table(data))
    if source.label_column is None:
        labels = np.zeros(len(table), dtype=np.int64)
    else:
        labels = np.asarray(data[source.label_column])
        classes = classes or found_names(data[source.label_column])
        check_names(classes)
    clients = partition_pools(pools, labels, settings)
    return ClientData(
        name,
        table,
        source.text_columns,
        source.label_column,
        classes,
        clients,
        source.target_column,
        tuple(f"{', '.join(dict.fromkeys(who))}: {note}" for note, who in notes.items()),
    )


def _can_train(source: HubSource, copy: LocalCopy | None, language: str) -> bool:
    """Return whether a language has the split `train`, if the train rows come from there."""
    if language in source.without_train:
        return False
    if copy is None or "train" not in source.train_split.split("+"):
        return True
    return "train" in copy.splits(language, source.train_split)


def _train_split(
    name: str, source: HubSource, copy: LocalCopy | None, language: str, new: bool
) -> str:
    """Return the splits that a language's train rows come from.

    A language without the split `train` may be new to the federation, and then has those of
    `validation`. A copy may have joined `validation` to `train`.
    """
    if not new and not _can_train(source, copy, language):
        raise UserError(
            f"Language {language!r} of {name} has no train split, only a validation split: name it "
            "in data.new_languages, or leave it out."
        )
    parts = source.train_split.split("+")
    if copy is not None:
        has = copy.splits(language, source.train_split)
        kept = [part for part in parts if part in has or part not in ("train", "validation")]
        return "+".join(kept) or source.train_split
    without = ("train",) if language in source.without_train else ()
    return "+".join(part for part in parts if part not in without)


def _notes(
    source: HubSource, copy: LocalCopy | None, part: str, split: str, rows: _Rows
) -> list[str]:
    """Return what `fedp2eft data describe` prints about a split that was read."""
    notes = [rows.form] if rows.form else []
    if part == "train" and split != source.train_split:
        has = split.split("+")
        missing = [each for each in source.train_split.split("+") if each not in has]
        notes.append(f"train rows from {split} alone, there is no split {'+'.join(missing)}")
    return notes


def _check_parallel(
    name: str, language: str, rows: _Rows, first_language: str, first: _Rows
) -> None:
    """Raise `UserError` where row n is not the same sentence in two languages."""
    if len(rows) != len(first):
        raise UserError(
            f"{name}: {language} has {len(rows)} rows and {first_language} {len(first)} in one "
            "split, where row n should be the same sentence in all languages. Copy it again."
        )
    mine, theirs = rows.sentences(), first.sentences()
    if mine is not None and theirs is not None and mine != theirs:
        row = next(
            n for n, (one, other) in enumerate(zip(mine, theirs, strict=True)) if one != other
        )
        raise UserError(
            f"{rows.where(row)}: sentence {mine[row]} where {first_language} has {theirs[row]}: "
            "the rows should be the same sentences in the same order in all languages."
        )


def _append(
    data: Columns, split: _Rows, rows: Indices, source: HubSource, classes: Sequence[str]
) -> Indices:
    """Copy rows of one split to the end of `data`, classes as names; their row indices there."""
    for column, values in split.take(rows).items():
        for row, value in zip(rows, values, strict=True):
            if value is None:
                raise UserError(f"{split.where(row)}: column {column!r} holds nothing.")
        if column == source.label_column:
            values = [
                class_name(value, classes, split.where(row), column)
                for row, value in zip(rows.tolist(), values, strict=True)
            ]
        data.setdefault(column, []).extend(values)
    end = len(data[source.text_columns[0]])
    return np.arange(end - len(rows), end, dtype=np.int64)
