"""Data sets of the Hugging Face Hub: one configuration a language, halved into two pools."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fedp2eft.data.federation import NEW_LANGUAGE, SEEN, UNSEEN, Federation, Rows
from fedp2eft.data.languages import choose_languages
from fedp2eft.data.partition import partition_pools, rng_for
from fedp2eft.data.table import first_line
from fedp2eft.errors import UserError, nearest
from fedp2eft.settings.data import PartitionKind

if TYPE_CHECKING:
    from datasets import Dataset

CONVERTED = "refs/convert/parquet"
"""The hub's own conversion of a data set to Parquet: its configurations are folders."""


@dataclass(frozen=True)
class HubSource:
    """Where a data set lies on the hub, and how its columns and splits are called.

    Attributes:
        path: repository, `owner/name`.
        text_columns: columns of the model's input.
        label_column: column of the class; None for a task without classes.
        target_column: column a generating model shall answer with.
        languages: its configurations that are languages; empty: any name is tried.
        train_split: split, or several joined by "+", that train rows are taken from.
        test_split: the same for test rows.
        pool_train: train rows of each language and pool; None: half of the split.
        pool_test: test rows of each language and pool; None: half of the split.
        revision: branch, tag or commit.
    """

    path: str
    text_columns: tuple[str, ...] = ("text",)
    label_column: str | None = "label"
    target_column: str | None = None
    languages: tuple[str, ...] = ()
    train_split: str = "train"
    test_split: str = "test"
    pool_train: int | None = None
    pool_test: int | None = None
    revision: str | None = None

    @property
    def columns(self) -> list[str]:
        """All columns that are used, each once."""
        extra = [column for column in (self.label_column, self.target_column) if column]
        return list(dict.fromkeys([*self.text_columns, *extra]))


XNLI = HubSource(
    "facebook/xnli",
    text_columns=("premise", "hypothesis"),
    languages=(
        *("ar", "bg", "de", "el", "en", "es", "fr", "hi"),
        *("ru", "sw", "th", "tr", "ur", "vi", "zh"),
    ),
    pool_train=2000,
    pool_test=500,
)
MASAKHANEWS = HubSource(
    "masakhane/masakhanews",
    text_columns=("headline_text",),
    languages=(
        *("amh", "eng", "fra", "hau", "ibo", "lin", "lug", "orm"),
        *("pcm", "run", "sna", "som", "swa", "tir", "xho", "yor"),
    ),
    train_split="train+validation",
    # The repository itself is a loading script, which `datasets` no longer runs.
    revision=CONVERTED,
)


def load_hub_dataset(
    path: str,
    config: str | None = None,
    *,
    split: str = "train",
    columns: Sequence[str] | None = None,
    revision: str | None = None,
) -> "Dataset":
    """One split of a data set of the hub, through `datasets.load_dataset` and its cache.

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


def load_hub(
    name: str,
    source: HubSource,
    languages: Sequence[str] | None = None,
    new_languages: Sequence[str] = (),
    *,
    clients_per_language: int = 20,
    alpha: float = 0.5,
    max_train: int | None = None,
    max_test: int | None = None,
    seed: int = 0,
    kind: PartitionKind = "per-pool",
) -> Federation:
    """A data set of the hub as a federation, after the paper (arXiv 2502.04387, data protocol).

    Each language's train and test rows are halved into a seen and an unseen pool, cut to
    `pool_train` and `pool_test` rows, and split over its clients by label. The halves are drawn
    alike for every language, so that of a data set whose row n is the same sentence in all
    languages (XNLI) no sentence is both seen and unseen, in any language.

    Args:
        name: the federation's name.
        source: where and what.
        languages: see `load_debian`.
        new_languages: see `load_debian`.
        clients_per_language: clients per language and pool.
        alpha: concentration of the Dirichlet distribution.
        max_train: at most this many train rows a client.
        max_test: at most this many test rows a client.
        seed: decides the halves and the split.
        kind: see `partition_pools`.

    Raises:
        UserError: as `load_hub_dataset` and `partition_pools`; languages with other classes; a
            row without text or class.
    """
    import datasets
    import pyarrow as pa

    spoken, new = choose_languages(name, source.languages, languages, new_languages)
    data: dict[str, list[Any]] = {}
    pools: dict[tuple[str, str], tuple[Rows, Rows]] = {}
    classes: tuple[str, ...] = ()
    for language in (*spoken, *new):
        halves = []
        for part, split, limit in (
            ("train", source.train_split, source.pool_train),
            ("test", source.test_split, source.pool_test),
        ):
            table = load_hub_dataset(
                source.path, language, split=split, columns=source.columns, revision=source.revision
            )
            names = _class_names(table, source.label_column)
            classes = classes or names
            if names != classes:
                raise UserError(f"{name}: the classes of {language} are {names}, not {classes}.")
            order = rng_for(seed, "pools", part).permutation(len(table))
            middle = len(table) // 2
            halves.append(
                [
                    _append(data, table, half[:limit], source, f"{name} ({language}, {split})")
                    for half in (order[:middle], order[middle:])
                ]
            )
        (seen, unseen), (seen_test, unseen_test) = halves
        if language in new:
            pools[language, NEW_LANGUAGE] = (unseen, unseen_test)
        else:
            pools[language, SEEN] = (seen, seen_test)
            pools[language, UNSEEN] = (unseen, unseen_test)
    table = datasets.Dataset(pa.table(data))
    if source.label_column is None:
        labels = np.zeros(len(table), dtype=np.int64)
    else:
        labels = np.asarray(data[source.label_column])
        classes = classes or tuple(sorted(set(data[source.label_column])))
    clients = partition_pools(
        pools,
        labels,
        clients=clients_per_language,
        alpha=alpha,
        seed=seed,
        max_train=max_train,
        max_test=max_test,
        kind=kind,
    )
    return Federation(
        name,
        table,
        source.text_columns,
        source.label_column,
        classes,
        clients,
        source.target_column,
    )


def _class_names(table: "Dataset", label_column: str | None) -> tuple[str, ...]:
    """The names that a column of class ids carries; () where it holds the names themselves."""
    names = getattr(table.features[label_column], "names", None) if label_column else None
    return tuple(names or ())


def _append(
    data: dict[str, list[Any]], table: "Dataset", rows: Rows, source: HubSource, what: str
) -> Rows:
    """Copy rows of one split to the end of `data`, classes as names; their row numbers there."""
    chosen = table[rows.tolist()]
    names = _class_names(table, source.label_column)
    for column, values in chosen.items():
        for row, value in zip(rows, values, strict=True):
            if value is None or (column == source.label_column and names and value < 0):
                raise UserError(f"{what}, row {row}: column {column!r} holds nothing.")
        if column == source.label_column:
            values = [names[value] if names else str(value) for value in values]
        data.setdefault(column, []).extend(values)
    end = len(data[source.text_columns[0]])
    return np.arange(end - len(rows), end, dtype=np.int64)
