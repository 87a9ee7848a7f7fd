"""Debian package descriptions in 16 languages: the data set that ships with the package.

Written and translated by volunteers of Debian and the Debian Description Translation Project; see
`assets/README.md` for the fields and the licence.
"""

from functools import cache
from importlib.resources import as_file, files
from typing import TYPE_CHECKING, Any

from fedp2eft.data.clients import ClientData
from fedp2eft.data.pools import clients_of_pools
from fedp2eft.settings.data import DataSettings

if TYPE_CHECKING:
    from datasets import Dataset

NAME = "debian-descriptions"
LABELS = ("admin", "devel", "doc", "games", "graphics", "libs", "net", "sound", "text", "utils")
LANGUAGES = (
    *("cs", "da", "de", "en", "es", "fr", "it", "ja"),
    *("ko", "pl", "pt", "pt_BR", "ru", "sk", "uk", "zh_CN"),
)


@cache
def read_descriptions() -> "Dataset":
    """Return all 22,127 rows in the order of the shipped file: 13 MB, read once per process."""
    from fedp2eft.data.table import read_table

    with as_file(files("fedp2eft.data") / "assets" / "debian_descriptions.jsonl.gz") as path:
        return read_table(path)


def load_debian(**settings: Any) -> ClientData:
    """Load Debian's package descriptions: text -> archive section (10 classes).

    Args:
        settings: fields of `DataSettings`: languages, clients_per_language, max_train, seed, …

    Returns:
        As `clients_of_debian`.
    """
    return clients_of_debian(DataSettings(**settings))


def clients_of_debian(settings: DataSettings) -> ClientData:
    """Load Debian's package descriptions, for an experiment's settings.

    The file's own `pool` and `split` are used: both follow the source package, so nothing of a
    package crosses train/test or seen/unseen in any language. Each language's pool is split over
    its clients by label (arXiv 2502.04387, experimental setup). The table always holds all
    languages, so a row's number is its place in the shipped file.

    Returns:
        Client data with `text_columns` ("text",), `label_column` "label" and `target_column`
        "summary" (for the generation task).

    Raises:
        UserError: an unknown language, a language in both lists, or too many clients.
    """
    return clients_of_pools(
        NAME,
        read_descriptions(),
        LANGUAGES,
        settings,
        text_columns=("text",),
        labels=LABELS,
        target_column="summary",
    )
