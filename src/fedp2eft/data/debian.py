"""Debian package descriptions in 16 languages: the data set that ships with the package.

Written and translated by volunteers of Debian and the Debian Description Translation Project; see
`assets/README.md` for the fields and the licence.
"""

from collections.abc import Sequence
from functools import cache
from importlib.resources import as_file, files
from typing import TYPE_CHECKING, Any

from fedp2eft.data.clients import ClientData
from fedp2eft.data.partition import Partition
from fedp2eft.data.pools import clients_of_pools

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
    """All 22,127 rows in the order of the shipped file: 13 MB, read once in a process."""
    from fedp2eft.data.table import read_table

    with as_file(files("fedp2eft.data") / "assets" / "debian_descriptions.jsonl.gz") as path:
        return read_table(path)


def load_debian(
    languages: Sequence[str] | None = None,
    new_languages: Sequence[str] = (),
    **split: Any,
) -> ClientData:
    """Load Debian's package descriptions: text -> archive section (10 classes).

    The file's own `pool` and `split` are used: both follow the source package, so nothing of a
    package crosses train/test or seen/unseen in any language. Each language's pool is split over
    its clients by label (arXiv 2502.04387, experimental setup). The table always holds all
    languages, so a row's number is its place in the shipped file.

    Args:
        languages: languages of the seen and unseen clients; None: all but `new_languages`.
        new_languages: languages that no seen client speaks. The rows of their unseen pool become
            clients of the pool `new-language`; their seen rows stay unused.
        split: further fields of `Partition`: clients_per_language, max_train, seed, …

    Returns:
        Client data with `text_columns` ("text",), `label_column` "label" and `target_column`
        "summary" (for the generation task).

    Raises:
        UserError: an unknown language or pool, a language in both lists, or too many clients.
    """
    return clients_of_pools(
        NAME,
        read_descriptions(),
        LANGUAGES,
        Partition(languages, new_languages, **split),
        text_columns=("text",),
        labels=LABELS,
        target_column="summary",
    )
