"""LibreOffice's help in many languages: title -> first paragraphs, for causal LMs.

A sample of few pages ships with the package; the repository's `scripts/build_libreoffice_help.py`
builds the whole from Debian's packages. See `assets/README.md` for the fields and the licence.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import as_file, files
from typing import TYPE_CHECKING

from fedp2eft.data.clients import SEEN, UNSEEN, ClientData
from fedp2eft.data.pools import clients_of_pools
from fedp2eft.data.table import read_table
from fedp2eft.errors import UserError
from fedp2eft.settings.data import DataSettings

if TYPE_CHECKING:
    from datasets import Dataset

NAME = "libreoffice-help"
LANGUAGES = (
    *("cs", "de", "el", "en_US", "es", "fr", "it", "ja"),
    *("ko", "pl", "pt_BR", "ru", "tr", "zh_CN"),
)
"""Those of the sample."""
COLUMNS = ("language", "pool", "split", "label")


@cache
def read_sample() -> Dataset:
    """Return all rows of the sample that ships with the package, in the order of the file."""
    with as_file(files("fedp2eft.data") / "assets" / "libreoffice_help_sample.jsonl.gz") as path:
        return read_table(path)


def load_libreoffice(settings: DataSettings) -> ClientData:
    """Load LibreOffice's help; the label that clients differ by is the part of LibreOffice.

    The file's own `pool` and `split` are used: both follow the page, so nothing of a page crosses
    train/test or seen/unseen in any language. Without `path` it is the sample.

    Returns:
        Client data with `text_columns` ("title",) and `target_column` "text".

    Raises:
        UserError: as `clients_of_pools`; a file that `build_libreoffice_help.py` did not write.
    """
    path = settings.path
    if path is None:
        table = read_sample()
    else:
        table = read_table(path, text_columns=["title", "text", *COLUMNS])
        for column, values in (("pool", (SEEN, UNSEEN)), ("split", ("train", "test"))):
            if wrong := set(table[column][:]) - set(values):
                raise UserError(
                    f"{path}: {column} {min(wrong)!r} is not one of {list(values)}. Make the file "
                    "with scripts/build_libreoffice_help.py of the repository."
                )
    return clients_of_pools(
        NAME,
        table,
        tuple(sorted(set(table["language"][:]))),
        settings,
        text_columns=("title",),
        labels=tuple(sorted(set(table["label"][:]))),
        target_column="text",
    )
