"""The data part of an experiment's settings."""

from dataclasses import dataclass, field
from typing import Literal

PartitionKind = Literal["per-pool", "reference"]
Proportions = Literal["train", "both"]
Texts = Literal["keep", "one-token"]


@dataclass(frozen=True)
class ClientFile:
    """One client's own file.

    Args:
        path: JSON (.jsonl, .json), CSV, TSV or Parquet; all but the last also with .gz, .bz2, .xz.
        language: language of its text; "und" if unknown.
        pool: seen (trains), unseen (never trains) or new-language.
        test_path: a second file of test rows: those with split "test", or all if it has no column
            split.
    """

    path: str
    language: str = "und"
    pool: str = "seen"
    test_path: str | None = None


@dataclass
class DataSettings:
    """The clients and their rows.

    Args:
        dataset: debian-descriptions (ships with the package), libreoffice-help (a sample of it
            does), files (your own), hub (any data set of the Hugging Face Hub), xnli, masakhanews,
            afrisenti or sib-200 (from the hub or a local copy), fed-aya (from a file), or nodes
            (each SuperNode's own file; docs/deployment.md).
        languages: languages of the seen and unseen clients; empty: all of the data set's.
        new_languages: languages that no seen client speaks; their clients never train. "random 40"
            draws 40 of those that are named nowhere, by the seed.
        clients_per_language: clients per language and pool.
        alpha: concentration of the Dirichlet distribution of labels over a pool's clients.
        max_train: maximum train rows per client.
        max_test: maximum test rows per client.
        seed: seed of the partition.
        proportions: what limits a pool's label proportions where a label runs short. train: its
            train rows alone; a test part then follows its train part as far as the test rows last.
            both: its train and its test rows, so that the two parts agree.
        partition: xnli, sib-200: per-pool draws one partition per language and pool; reference
            draws one from the seen labels and repeats it in all, like the paper's public
            implementation.
        path: files: one file, with a column "client" unless it is one client's; hub: owner/name, or
            a folder; xnli, masakhanews, afrisenti, sib-200: a local copy, with one folder per
            language; fed-aya, libreoffice-help: the data set's file.
        files: files: client name to its file, instead of path.
        text_columns: files, hub, nodes: columns of the model's input.
        label_column: files, hub, nodes: column of the class; null for a task without classes.
        target_column: files, hub, nodes: column of the responses, for a causal LM. A column of
            conversations (lists of role and content) is text column and target column in one.
        labels: files, nodes: class names in the order of their ids; files, if empty: the values
            found, sorted.
        test_fraction: files, nodes: share of a client's rows to test on, if the file has no split.
        train_split: hub: split of the train rows; join several by "+".
        test_split: hub: split of the test rows.
        pool_train: hub: train rows per language and pool; null: half of the split.
        pool_test: hub: test rows per language and pool; null: half of the split.
        revision: hub: branch, tag or commit.
        unique: drop rows whose text occurred before, train rows first: per client (files, nodes,
            fed-aya) or per language.
        holdout: share of each client's train rows to hold out and score on, instead of its test
            rows, which stay untouched: for choosing settings.
        texts: one-token: every text is replaced by the same token, so that what personalization
            still gains is not in the text.
        merge_clients: merge the clients of a language and pool after the partition: a bound, on
            the same train and test rows.
    """

    dataset: str = "debian-descriptions"
    languages: list[str] = field(default_factory=list)
    new_languages: list[str] = field(default_factory=list)
    clients_per_language: int = 5
    alpha: float = 0.5
    max_train: int | None = None
    max_test: int | None = None
    seed: int = 0
    proportions: Proportions = "train"
    partition: PartitionKind = "per-pool"
    path: str | None = None
    files: dict[str, ClientFile] = field(default_factory=dict)
    text_columns: list[str] = field(default_factory=lambda: ["text"])
    label_column: str | None = "label"
    target_column: str | None = None
    labels: list[str] = field(default_factory=list)
    test_fraction: float = 0.2
    train_split: str = "train"
    test_split: str = "test"
    pool_train: int | None = None
    pool_test: int | None = None
    revision: str | None = None
    unique: bool = False
    holdout: float = 0.0
    texts: Texts = "keep"
    merge_clients: bool = False

    def __post_init__(self) -> None:
        # jsonargparse leaves the values of a mapping as it parsed them
        self.files = {
            name: file if isinstance(file, ClientFile) else ClientFile(**vars(file))
            for name, file in self.files.items()
        }

    @property
    def ablations(self) -> list[str]:
        """Return what was done to the rows for a diagnostic, in words."""
        found = []
        if self.texts == "one-token":
            found.append("every text replaced by one token")
        if self.merge_clients:
            found.append("the clients of a language and pool merged into one")
        return found
