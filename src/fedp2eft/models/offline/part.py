"""Copies of hub models that come as Python packages, converted to model folders once."""

from __future__ import annotations

import errno
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from shutil import copymode, disk_usage

from fedp2eft.errors import UserError
from fedp2eft.models.cache import cached_folder

TERMS = "FEDP2EFT_ACCEPT_TERMS"
"""Environment variable: hub names of the models whose terms the user accepts, commas between."""


@dataclass(frozen=True, kw_only=True)
class OfflinePart(ABC):
    """A copy of a hub model that comes as a Python package.

    Attributes:
        hub_name: the model that it is a copy of.
        package: the Python package, and which version.
        folder: name of the converted model's folder in the cache.
        bits: of its weights, in words.
        licence: of the model, one line.
        room: bytes that the converted folder takes, rounded up.
        install: the command that gets the package.
        terms: where the terms are that a user must accept first; "" if there are none.
    """

    hub_name: str
    package: tuple[str, str]
    folder: str
    bits: str
    licence: str
    room: int
    install: str
    terms: str = ""

    @property
    def revision(self) -> str:
        """The package and version, as pip writes it."""
        return "==".join(self.package)

    @property
    def accepted(self) -> bool:
        """Whether there are no terms, or the user accepts them."""
        names = os.environ.get(TERMS, "").replace(" ", "").split(",")
        return not self.terms or self.hub_name in names

    def provide(self) -> Path:
        """Return the converted model's folder in the cache, converted now the first time.

        Raises:
            UserError: terms that were not accepted; a package that is not installed; a file that
                is not the expected one.
        """
        if not self.accepted:
            raise UserError(
                f"{self.hub_name} has its own terms: read {self.terms} and, if you accept "
                f"them, set {TERMS}={self.hub_name}."
            )
        return cached_folder(self.folder, self.convert)

    def convert(self, folder: Path) -> None:
        """Write model, config, tokenizer and README into an existing folder.

        Raises:
            UserError: see `provide`.
            OSError: the disk has no room for the folder.
        """
        name, version = self.package
        try:
            found = distribution(name).version
        except PackageNotFoundError:
            raise UserError(
                f"The offline copy of {self.hub_name} is in the package {name}, which is not "
                f"installed: {self.install}"
            ) from None
        if found != version:
            raise UserError(
                f"The package {name} is installed as {found}; the offline copy of {self.hub_name} "
                f"is read from {version}: {self.install}"
            )
        # Asked beforehand: the writers below name a full disk in a way of their own each.
        if disk_usage(folder).free < self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
        self.write(folder)
        # safetensors writes for the owner's eyes only, but a cache may be shared.
        copymode(folder / "config.json", folder / "model.safetensors")
        (folder / "README.md").write_text(
            f"# {self.hub_name}, dequantized\n\nThe {self.bits} copy of the weights in the Python "
            f"package {self.revision}, expanded to fp32.\nLicence of the original model: "
            f"{self.licence}. https://huggingface.co/{self.hub_name}\n",
            encoding="utf-8",
        )

    @abstractmethod
    def write(self, folder: Path) -> None:
        """Write model, config and tokenizer of the installed package into an existing folder."""


def installed_file(package: str, path: str) -> Path:
    """Return where an installed package keeps a file; nothing of the package is imported."""
    return Path(str(distribution(package).locate_file(path)))
