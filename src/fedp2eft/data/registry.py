"""The data sets by name. A new one is an entry in `DATASETS`."""

from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from functools import partial
from pathlib import Path

from fedp2eft.data import debian, fed_aya, libreoffice
from fedp2eft.data.ablation import merge_clients, without_text
from fedp2eft.data.clients import ClientData
from fedp2eft.data.files import clients_from_files
from fedp2eft.data.hub import load_hub
from fedp2eft.data.known import KNOWN, HubSource
from fedp2eft.data.label_shift import warn_of_label_shift
from fedp2eft.data.nodes import NODES, data_without_clients
from fedp2eft.data.partition import hold_out
from fedp2eft.errors import UserError, nearest
from fedp2eft.settings.data import DataSettings


@dataclass(frozen=True)
class DatasetEntry:
    """What `fedp2eft data` shows about a data set, and how to load it.

    Attributes:
        description: one line.
        languages: those it has; empty where that depends on the files.
        licence: one line.
        loader: settings -> data.
        unused: settings that mean nothing to it and must stay at their default.
    """

    description: str
    languages: tuple[str, ...]
    licence: str
    loader: Callable[[DataSettings], ClientData]
    unused: tuple[str, ...]


def _load_hub(settings: DataSettings) -> ClientData:
    if settings.path is None:
        raise UserError(
            "Set data.path to the data set's name on the hub (owner/name), or a folder."
        )
    values = {name: getattr(settings, name) for name in (*_COLUMNS, *_HUB_ONLY)}
    source = HubSource(**values | {"text_columns": tuple(settings.text_columns)})
    folder = Path(settings.path).expanduser()
    if not folder.is_dir():
        return load_hub(settings.path.replace("/", "-"), source, settings)
    if settings.revision is not None:
        raise UserError(f"{folder} is a local copy, which has no data.revision: remove it.")
    return load_hub(folder.resolve().name, source, settings, folder)


def _load_preset(name: str, settings: DataSettings) -> ClientData:
    folder = Path(settings.path).expanduser() if settings.path else None
    return load_hub(name, KNOWN[name], settings, folder)


_HUB_ONLY = ("train_split", "test_split", "pool_train", "pool_test", "revision")
_COLUMNS = ("path", "text_columns", "label_column", "target_column")
_FILES_ONLY = ("files", "labels", "test_fraction")
_SPLIT = (
    *("languages", "new_languages", "clients_per_language"),
    *("alpha", "max_train", "max_test", "proportions"),
)


def _preset(name: str, description: str, licence: str, *unused: str) -> DatasetEntry:
    """Return a data set of the hub that is known by name."""
    return DatasetEntry(
        f"{description}; from the hub, or a local copy in data.path",
        KNOWN[name].languages,
        licence,
        partial(_load_preset, name),
        (*_COLUMNS[1:], *_FILES_ONLY, *_HUB_ONLY, *unused),
    )


DATASETS: dict[str, DatasetEntry] = {
    debian.NAME: DatasetEntry(
        "Debian package descriptions, archive section as label (10 classes); ships with the "
        "package",
        debian.LANGUAGES,
        "free licence of each package; name Debian and the Debian Description Translation Project",
        debian.clients_of_debian,
        (*_COLUMNS, *_FILES_ONLY, *_HUB_ONLY, "partition"),
    ),
    libreoffice.NAME: DatasetEntry(
        "LibreOffice help, title to first paragraphs, for causal LMs; a sample ships with the "
        "package, scripts/build_libreoffice_help.py in the repository builds the whole",
        libreoffice.LANGUAGES,
        "MPL-2.0; name LibreOffice and its translators",
        libreoffice.load_libreoffice,
        (*_COLUMNS[1:], *_FILES_ONLY, *_HUB_ONLY, "partition"),
    ),
    fed_aya.NAME: DatasetEntry(
        "Fed-Aya, instructions and responses of 38 annotators, for causal LMs; data.path is the "
        "JSON file that FedLLM-Bench publishes",
        fed_aya.LANGUAGES,
        "Apache-2.0",
        fed_aya.load_fed_aya,
        (*_COLUMNS[1:], *_FILES_ONLY, *_HUB_ONLY, *_SPLIT[1:], "partition"),
    ),
    "files": DatasetEntry(
        "your own JSON, CSV, TSV or Parquet: one file per client, or one with a column client",
        (),
        "yours",
        clients_from_files,
        (*_SPLIT, *_HUB_ONLY, "partition"),
    ),
    NODES: DatasetEntry(
        "each SuperNode's own file, named in its node config; nobody holds more than one",
        (),
        "theirs",
        data_without_clients,
        (*_SPLIT, *_HUB_ONLY, "partition", "path", "files", "merge_clients"),
    ),
    "hub": DatasetEntry(
        "any data set of the Hugging Face Hub that has one configuration a language",
        (),
        "see its page on the hub",
        _load_hub,
        (*_FILES_ONLY, "partition"),
    ),
    "xnli": _preset(
        "xnli",
        "natural language inference (3 classes), 2,000 train and 500 test rows per language and "
        "pool",
        "CC BY-NC 4.0",
    ),
    "masakhanews": _preset(
        "masakhanews",
        "news topics (7 classes) in African languages, headline and text",
        "AFL-3.0",
        "partition",
    ),
    "afrisenti": _preset(
        "afrisenti",
        "sentiment of tweets (3 classes) in African languages; orm and tir can be new languages "
        "only",
        "CC BY 4.0",
        "partition",
    ),
    "sib-200": _preset(
        "sib-200", "topics of the same sentences (7 classes) in 205 languages", "CC BY-SA 4.0"
    ),
}


def find(settings: DataSettings) -> DatasetEntry:
    """Return the entry that `settings.dataset` names.

    Raises:
        UserError: no such data set, or a setting changed that means nothing to it.
    """
    if settings.dataset not in DATASETS:
        raise UserError(
            f"Data set {settings.dataset!r} is unknown."
            f"{nearest(settings.dataset, list(DATASETS))} Known: {', '.join(DATASETS)}."
        )
    entry = DATASETS[settings.dataset]
    for item in fields(settings):
        plain = item.default if item.default_factory is MISSING else item.default_factory()
        if item.name in entry.unused and getattr(settings, item.name) != plain:
            raise UserError(f"Data set {settings.dataset} ignores data.{item.name}: remove it.")
    if settings.labels and settings.label_column is None:
        raise UserError("data.labels names classes and data.label_column is null: remove one.")
    return entry


def load_clients(settings: DataSettings, *, labels_used: bool = True) -> ClientData:
    """Load the clients and rows that the settings describe.

    Args:
        settings: the data set and its partition.
        labels_used: whether labels are predicted; if so, a label shift made by the partition is
            warned of.

    Raises:
        UserError: an unknown data set, a setting that it has no use for, or as its loader does.
    """
    entry = find(settings)
    data = entry.loader(settings)
    data = hold_out(data, settings) if settings.holdout else data
    # Clients with files of their own (alpha unused) were not dealt their rows here.
    if labels_used and "alpha" not in entry.unused:
        warn_of_label_shift(data)
    if settings.merge_clients:
        data = merge_clients(data)
    return without_text(data) if settings.texts == "one-token" else data
