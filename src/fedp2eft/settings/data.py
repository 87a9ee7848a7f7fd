"""The data part of an experiment's settings."""

from dataclasses import dataclass, field
from typing import Literal

PartitionKind = Literal["per-pool", "reference"]


@dataclass(frozen=True)
class ClientFile:
    """One client's own file.

    Args:
        path: JSON (.jsonl, .json), CSV, TSV or Parquet; all but the last also with .gz, .bz2, .xz.
        language: the language of its text; "und" where it is unknown.
        pool: seen (trains), unseen (never trains) or new-language.
        test_path: another file whose rows are test rows: those that its column split calls test,
            or else all.
    """

    path: str
    language: str = "und"
    pool: str = "seen"
    test_path: str | None = None


@dataclass
class DataSettings:
    """Which rows the clients have.

    Args:
        dataset: debian-descriptions (ships with the package), libreoffice-help (a sample of it
            does), files (your own), hub (any data set of the Hugging Face Hub), xnli, masakhanews,
            afrisenti or sib-200 (from the hub or a local copy), fed-aya (from a file), or nodes
            (each SuperNode's own file; docs/deployment.md).
        languages: languages of the seen and unseen clients; empty: all that the data set has.
        new_languages: languages that no seen client speaks; their clients never train.
        clients_per_language: clients per language and pool.
        alpha: concentration of the Dirichlet distribution of labels over a pool's clients.
        max_train: at most this many train rows a client.
        max_test: at most this many test rows a client.
        seed: seed of the partition.
        partition: xnli, sib-200: per-pool draws one for each language and pool; reference draws one
            from the seen labels and repeats it in all, as the paper's public implementation does.
        path: files: one file, with a column "client" or else one client's; hub: owner/name, or a
            folder; xnli, masakhanews, afrisenti, sib-200: a local copy, with one folder per
            language; fed-aya, libreoffice-help: the data set's file.
        files: files: client name to its file, in place of path.
        text_columns: files, hub, nodes: columns of the model's input.
        label_column: files, hub, nodes: column of the class; null for a task without classes.
        target_column: files, hub, nodes: column a generating model shall answer with. A column of
            conversations (lists of role and content) is text column and target column in one.
        labels: files, nodes: class names in the order of their ids; files, where empty: the values
            found, sorted.
        test_fraction: files, nodes: share of a client's rows to test on where the file does not
            say.
        train_split: hub: split that train rows are taken from, several joined by "+".
        test_split: hub: split that test rows are taken from.
        pool_train: hub: train rows per language and pool; null: half of the split.
        pool_test: hub: test rows per language and pool; null: half of the split.
        revision: hub: branch, tag or commit.
        unique: of rows with the same text, keep the first alone, train rows before test rows: per
            client (files, nodes, fed-aya) or per language.
        holdout: share of each client's train rows to hold out and score on in place of its test
            rows, which are then not looked at: for choosing settings.
    """

    dataset: str = "debian-descriptions"
    languages: list[str] = field(default_factory=list)
    new_languages: list[str] = field(default_factory=list)
    clients_per_language: int = 5
    alpha: float = 0.5
    max_train: int | None = None
    max_test: int | None = None
    seed: int = 0
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

    def __post_init__(self) -> None:
        # jsonargparse leaves the values of a mapping as it parsed them
        self.files = {
            name: file if isinstance(file, ClientFile) else ClientFile(**vars(file))
            for name, file in self.files.items()
        }
