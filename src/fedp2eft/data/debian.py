"""Debian package descriptions in 16 languages: the data set that ships with the package.

Written and translated by volunteers of Debian and the Debian Description Translation Project; see
`assets/README.md` for the fields and the licence.
"""

from collections.abc import Sequence
from functools import cache
from importlib.resources import as_file, files
from typing import TYPE_CHECKING

from fedp2eft.data.clients import SEEN, UNSEEN, ClientData
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
    *,
    clients_per_language: int = 5,
    alpha: float = 0.5,
    max_train: int | None = None,
    max_test: int | None = None,
    seed: int = 0,
    unique: bool = False,
    pools: Sequence[str] = (SEEN, UNSEEN),
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
        clients_per_language: clients per language and pool.
        alpha: concentration of the Dirichlet distribution.
        max_train: at most this many train rows a client.
        max_test: at most this many test rows a client.
        seed: decides the split, together with language and pool alone.
        unique: of a pool's rows with the same text, keep the first, train rows before test rows.
        pools: which pools of `languages` become clients.

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
        languages,
        new_languages,
        text_columns=("text",),
        labels=LABELS,
        target_column="summary",
        clients_per_language=clients_per_language,
        alpha=alpha,
        max_train=max_train,
        max_test=max_test,
        seed=seed,
        unique=unique,
        pools=pools,
    )
