"""Where the data sets of the Hugging Face Hub lie that are known by name, and what is in them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files

CONVERTED = "refs/convert/parquet"
"""The hub's own conversion of a data set to Parquet: its configurations are folders.

For repositories that are a loading script, which `datasets` no longer runs.
"""


@dataclass(frozen=True)
class HubSource:
    """Where a data set lies on the hub, and how its columns and splits are called.

    Attributes:
        path: repository, `owner/name`.
        text_columns: columns of the model's input.
        label_column: column of the class; None for a task without classes.
        target_column: column a generating model shall answer with.
        labels: class names in the order of their ids; empty: as its files say, else sorted.
        languages: its configurations that are languages; empty: any name is tried.
        without_train: those of them that have no train split, only validation and test.
        train_split: split, or several joined by "+", that train rows are taken from.
        test_split: the same for test rows.
        pool_train: train rows of each language and pool; None: half of the split.
        pool_test: test rows of each language and pool; None: half of the split.
        revision: branch, tag or commit.
        parallel: row n of a split is the same sentence in all languages.
        row_id: the column that names a row's sentence, in those copies that have it.
        quoted: whether its authors quote the fields of their TSV; None: found.
        other_names: column -> what copies call it: each a list of columns, joined by a blank.
    """

    path: str
    text_columns: tuple[str, ...] = ("text",)
    label_column: str | None = "label"
    target_column: str | None = None
    labels: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()
    without_train: tuple[str, ...] = ()
    train_split: str = "train"
    test_split: str = "test"
    pool_train: int | None = None
    pool_test: int | None = None
    revision: str | None = None
    parallel: bool = False
    row_id: str | None = None
    quoted: bool | None = None
    other_names: Mapping[str, tuple[tuple[str, ...], ...]] = field(default_factory=dict)

    @property
    def columns(self) -> list[str]:
        """All columns that are used, each once."""
        extra = [column for column in (self.label_column, self.target_column) if column]
        return list(dict.fromkeys([*self.text_columns, *extra]))


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _listed(asset: str) -> tuple[str, ...]:
    return _words((files("fedp2eft.data") / "assets" / asset).read_text(encoding="utf-8"))


XNLI = HubSource(
    "facebook/xnli",
    text_columns=("premise", "hypothesis"),
    labels=("entailment", "neutral", "contradiction"),
    languages=_words("ar bg de el en es fr hi ru sw th tr ur vi zh"),
    pool_train=2000,
    pool_test=500,
    parallel=True,
)
MASAKHANEWS = HubSource(
    "masakhane/masakhanews",
    text_columns=("headline_text",),
    labels=_words("business entertainment health politics religion sports technology"),
    languages=_words("amh eng fra hau ibo lin lug orm pcm run sna som swa tir xho yor"),
    train_split="train+validation",
    revision=CONVERTED,
    other_names={"headline_text": (("headline", "text"),), "label": (("category",),)},
)
AFRISENTI = HubSource(
    "shmuhammad/AfriSenti-twitter-sentiment",
    text_columns=("tweet",),
    labels=("negative", "neutral", "positive"),
    languages=_words("amh arq ary hau ibo kin pcm por swa tso twi yor orm tir"),
    without_train=("orm", "tir"),
    train_split="train+validation",
    revision=CONVERTED,
    # Some files hold tweets that look as if they were quoted, others some that could not be.
    quoted=False,
    other_names={"tweet": (("text",),)},
)
SIB_200 = HubSource(
    "Davlan/sib200",
    label_column="category",
    labels=_words("entertainment geography health politics science/technology sports travel"),
    languages=_listed("sib_200_languages.txt"),
    train_split="train+validation",
    revision=CONVERTED,
    parallel=True,
    row_id="index_id",
    other_names={"category": (("label",),)},
)
KNOWN = {"xnli": XNLI, "masakhanews": MASAKHANEWS, "afrisenti": AFRISENTI, "sib-200": SIB_200}
"""Name of the data set -> where it lies."""
