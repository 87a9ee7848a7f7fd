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
        language: Language of its text; "und" if unknown.
        pool: "seen" (trains), "unseen" (never trains) or "new-language".
        test_path: A second file of test rows: those with split "test", or all if it has no column
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
        dataset: "debian-descriptions" (ships with the package), "libreoffice-help" (a sample of it
            does), "files" (your own), "hub" (any data set of the Hugging Face Hub), "xnli",
            "masakhanews", "afrisenti" or "sib-200" (from the hub or a local copy), "fed-aya" (from
            a file), or "nodes" (each SuperNode's own file; docs/deployment.md).
        languages: Languages of the seen and unseen clients. Default: all of the data set's.
        new_languages: Languages that no seen client speaks; their clients never train. "random 40"
            draws 40, by the seed, of those named neither here nor in `languages`.
        clients_per_language: Clients per language and pool.
        alpha: Concentration of the Dirichlet distribution of labels over a pool's clients.
        max_train: Maximum number of train rows per client.
        max_test: Maximum number of test rows per client.
        seed: Seed of the partition.
        proportions: What limits a pool's label proportions if a label runs short. "train": its
            train rows; test proportions then follow train proportions as far as the test rows last.
            "both": its train and its test rows, so that the two agree.
        partition: For xnli and sib-200. "per-pool" draws one partition per language and pool;
            "reference" draws one from the seen labels and repeats it in all, like the paper's
            public implementation.
        path: For files: one file, with a column "client" unless all rows are one client's. For hub:
            owner/name, or a folder. For xnli, masakhanews, afrisenti and sib-200: a local copy,
            with one folder per language. For fed-aya and libreoffice-help: the data set's file.
        files: For files: client name to its file, instead of path.
        text_columns: For files, hub and nodes: columns of the model's input.
        label_column: For files, hub and nodes: column of the class; null for a task without
            classes.
        target_column: For files, hub and nodes: column of the responses, for a causal LM. A column
            of conversations (lists of role and content) is text column and target column in one.
        labels: For files and nodes: class names in the order of their ids. Default, for files: the
            values found, sorted.
        test_fraction: For files and nodes: share of a client's rows to test on, if the file has no
            split.
        train_split: For hub: split of the train rows; join several by "+".
        test_split: For hub: split of the test rows.
        pool_train: For hub: train rows per language and pool. Default: half of the split.
        pool_test: For hub: test rows per language and pool. Default: half of the split.
        revision: For hub: branch, tag or commit.
        unique: Drop rows whose text occurred before, train rows first: per client (files, nodes,
            fed-aya) or per language.
        holdout: Share of each client's train rows to hold out and score on, instead of its test
            rows, which stay untouched: for choosing settings.
        texts: "one-token" replaces every text by the same token, so that what personalization
            still gains does not come from the text.
        merge_clients: Merge the clients of a language and pool after the partition: an upper bound,
            on the same train and test rows.
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
