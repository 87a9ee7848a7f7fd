"""Loads base models and tokenizers from local folders; never code, never pickles."""

import logging
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from fnmatch import fnmatch
from functools import cache
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fedp2eft.errors import UserError, first_line
from fedp2eft.files import write_folder, write_json
from fedp2eft.models.fit import (
    choose_padding,
    longest_input,
    name_classes,
    take_padding,
    vocabulary_size,
)
from fedp2eft.models.sources import VOCABULARY_FILES, ModelSource, weight_files
from fedp2eft.modes import quiet_transformers
from fedp2eft.settings.experiment import Quantize

Task = Literal["classification", "causal_lm"]
# On a CPU the backward pass of torch's fused attention is slower than plain matrix products until
# rows get long: a whole training step at 64 tokens takes 1.5 times as long with it.
_EAGER = 256
_BLOCK = re.compile(r"\.(layers?|h|blocks?)\.\d+\.")
logger = logging.getLogger(__name__)
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def load_base(
    source: ModelSource,
    task: Task,
    *,
    labels: Sequence[str] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    device: torch.device | str = "cpu",
    max_length: int | None = None,
    quantize: Quantize = "none",
    gradient_checkpointing: bool = False,
) -> PreTrainedModel:
    """Return the base model with the head for `task`, in evaluation mode.

    Layers of a classification head that the folder does not hold (the classifier; for BERT also
    the pooler, if absent) are drawn from `seed`: the same ones for every call with the same seed,
    dtype and model, on any device, and without touching the global random state.

    Args:
        source: from `resolve_model`.
        task: `"classification"` (one label per text) or `"causal_lm"`.
        labels: the data's class names in the order of their ids. A trained head is put into this
            order by the names in its config; without `labels` it is taken as it is.
        tokenizer: from `load_tokenizer`; loaded if it is not given. It chooses the padding token.
        dtype: of all weights, the head included.
        seed: for the layers that are new.
        device: where the model is put.
        max_length: longest input in tokens that it will see; on a CPU short ones get plain
            attention.
        quantize: hold the linear layers in 8 or 4 bits (LLM.int8, NF4), through PEFT's preparation:
            everything else is in fp32 then, and the 4-bit products are taken in `dtype`.
        gradient_checkpointing: compute each block's forward pass again in the backward pass of a
            model in training mode.

    Raises:
        UserError: the folder does not fit the task, the classes or the longest input, or cannot be
            loaded.
    """
    if task not in ("classification", "causal_lm"):
        raise UserError(f"Task {task!r} is unknown: use classification or causal_lm.")
    config = _load(source, AutoConfig)
    options: dict[str, Any] = {"config": config, "dtype": dtype, "use_safetensors": True}
    declared = declares_head(config)
    if task == "classification":
        _set_labels(config, len(labels), source)
        auto = AutoModelForSequenceClassification
        # A head of another size is refused below, in one line instead of a page.
        options["ignore_mismatched_sizes"] = True
    else:
        auto = AutoModelForCausalLM
    if quantize != "none":
        options |= {"quantization_config": _bits(quantize, dtype), "device_map": {"": device}}
    with quiet_transformers(), torch.random.fork_rng(devices=[]):  # as it was, afterwards
        torch.default_generator.manual_seed(seed)
        model, report = _load(source, auto, output_loading_info=True, **options)
    _check_report(model, report, task == "causal_lm" or declared, task, source)
    limit = longest_input(model)
    if max_length is not None and limit is not None and max_length > limit:
        raise UserError(
            f"The longest input is set to {max_length} tokens and {source.name} reads at most "
            f"{limit}: set max_length to {limit} or less."
        )
    if task == "classification":
        if labels:
            name_classes(model, labels, _has_trained_head(model, report), source.name)
        with suppress(UserError) if tokenizer is None else nullcontext():  # weights alone
            take_padding(model, tokenizer or load_tokenizer(source))
    if max_length is not None:
        prepare_for_length(model, max_length, device)
    if gradient_checkpointing:
        _checkpoint(model)
    if quantize != "none":
        from peft import prepare_model_for_kbit_training

        prepared: PreTrainedModel = prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=False
        )
        return prepared.eval()
    return model.to(device).eval()


def prepare_for_length(model: Any, max_length: int, device: torch.device | str) -> None:
    """Choose the attention that is fastest for inputs of at most that many tokens."""
    if max_length <= _EAGER and torch.device(device).type == "cpu":
        model.set_attn_implementation("eager")


def _bits(quantize: Quantize, dtype: torch.dtype) -> Any:
    if find_spec("bitsandbytes") is None:
        raise UserError(
            f"model.quantize is {quantize}, which needs bitsandbytes: "
            "pip install 'fedp2eft[quantized]'"
        )
    from transformers import BitsAndBytesConfig

    if quantize == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )


def _checkpoint(model: PreTrainedModel) -> None:
    try:
        # Not reentrant: gradients reach the adapters of a block whose input has none.
        model.activation_checkpointing_enable({"use_reentrant": False})
    except ValueError as error:
        raise UserError(
            f"A {type(model).__name__} has no gradient checkpointing: set "
            "model.gradient_checkpointing to false."
        ) from error


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """Return the folder's tokenizer; it has a padding token (`fit.choose_padding`).

    Raises:
        UserError: the folder holds no tokenizer that can be loaded.
    """
    tokenizer = None
    if _has_vocabulary(source):
        tokenizer = _load(source, AutoTokenizer)
    else:  # transformers would make one up that knows no words, unless it needs none (ByT5, CANINE)
        with suppress(UserError):
            found = _load(source, AutoTokenizer)
            tokenizer = found if not found.vocab_files_names else None
    if tokenizer is None:
        raise UserError(
            f"The folder {source.path} has no tokenizer: put the model's tokenizer.json into it."
        )
    choose_padding(tokenizer, vocabulary_size(_load(source, AutoConfig)))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        tokenizer.first_limits = backend.truncation, backend.padding
    return tokenizer


def _has_vocabulary(source: ModelSource) -> bool:
    names = [path.name for path in Path(source.path).iterdir()]
    return any(fnmatch(name, pattern) for name in names for pattern in VOCABULARY_FILES)


def as_loaded(tokenizer: Any) -> Any:
    """Return a tokenizer of `load_tokenizer` as it was at first, for writing it to a file.

    One that has cut rows would carry that into its file; loading another takes seconds.
    """
    if hasattr(tokenizer, "first_limits"):
        truncation, padding = tokenizer.first_limits
        backend = tokenizer.backend_tokenizer
        backend.enable_truncation(**truncation) if truncation else backend.no_truncation()
        backend.enable_padding(**padding) if padding else backend.no_padding()
    return tokenizer


def stored_dtype(source: ModelSource) -> torch.dtype:
    """Return the dtype that most of a folder's weights are stored in."""
    counts: Counter[torch.dtype] = Counter()
    for file in weight_files(Path(source.path)):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                part = tensors.get_slice(name)
                dtype = _DTYPES.get(part.get_dtype())
                if dtype is not None:
                    counts[dtype] += prod(part.get_shape())
    return counts.most_common(1)[0][0] if counts else torch.float32


def load_config(source: ModelSource) -> Any:
    """Return the folder's transformers configuration; a `UserError` where it cannot be read."""
    return _load(source, AutoConfig)


def save_model(
    folder: Path,
    model: Any,
    tokenizer: Any,
    facts: Mapping[str, Any] | None = None,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Write a model and its tokenizer as a folder that `from_pretrained` loads, or not at all.

    Args:
        folder: where to; an older one is replaced.
        model: of transformers.
        tokenizer: its tokenizer.
        facts: JSON values to put beside them, by name of the file.
        check: looks at the new folder before it is kept; whatever it raises, nothing is.

    Raises:
        UserError: the disk is full or cannot be written.
    """

    def write(scratch: Path) -> None:
        with quiet_transformers():
            model.save_pretrained(scratch)
            tokenizer.save_pretrained(scratch)
        for name, value in (facts or {}).items():
            write_json(scratch / name, value)
        if check is not None:
            check(scratch)

    write_folder(folder, write)


def _load(source: ModelSource, auto: Any, **options: Any) -> Any:
    try:
        return auto.from_pretrained(
            source.path, local_files_only=True, trust_remote_code=False, **options
        )
    except Exception as error:  # the loaders raise whatever a damaged file leads to
        what = {AutoConfig: "configuration", AutoTokenizer: "tokenizer"}.get(auto, "model")
        raise UserError(
            f"The {what} in {source.path} cannot be loaded: {first_line(error)}."
        ) from error


def declares_head(config: Any) -> bool:
    """Return whether a folder's config says that a classification head is in its weights."""
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or [])


def _set_labels(config: Any, classes: int, source: ModelSource) -> None:
    trained = declares_head(config)
    if not classes and not trained:
        raise UserError(
            f"{source.name} has no trained classification head: choose a model that has one (the "
            "base of a run has), or give labels for a new one."
        )
    if classes == 1:
        raise UserError("There is 1 label: a classification needs at least 2.")
    if trained and classes and config.num_labels != classes:
        raise _other_head(source, config.num_labels, classes)
    if classes and config.num_labels != classes:  # setting it resets the labels' names
        config.num_labels = classes
    config.problem_type = "single_label_classification"


def _check_report(
    model: Any, report: dict[str, Any], complete: bool, task: Task, source: ModelSource
) -> None:
    """Refuse a folder in which anything is missing, except a head if it is not `complete`.

    Blocks that the config has no place for are an error: nobody computes with those weights.
    """
    for name, found, wanted in report["mismatched_keys"]:
        if not name.startswith(model.base_model_prefix + "."):
            raise _other_head(source, found[0], wanted[0])
    bad = sorted(key for key, *_ in report["mismatched_keys"])
    for key in sorted(report["missing_keys"]):
        inside = key.startswith(model.base_model_prefix + ".")
        if ".pooler." not in key and (inside or complete):
            bad.append(key)
    spare = sorted(key for key in report["unexpected_keys"] if _BLOCK.search(key))
    if spare:
        _say_spare(source.name, type(model).__name__, len(spare), spare[0])
    if bad:
        raise UserError(
            f"The weights in {source.path} do not fit a {type(model).__name__}: {bad[0]} is "
            f"missing or of another size ({len(bad)} in all). Choose a model for the task {task}."
        )


@cache  # once per folder and process
def _say_spare(name: str, kind: str, count: int, first: str) -> None:
    logger.warning(
        "%s: %d weights are left out; a %s with this config.json has no place for them (first: "
        "%s).", name, count, kind, first,
    )  # fmt: skip


def _has_trained_head(model: Any, report: dict[str, Any]) -> bool:
    """Return whether every layer outside the base was loaded."""
    return all(key.startswith(model.base_model_prefix + ".") for key in report["missing_keys"])


def _other_head(source: ModelSource, found: int, wanted: int) -> UserError:
    return UserError(
        f"{source.name} holds a classification head for {found} labels, and {wanted} are needed: "
        "use the base model without a head, or data with its labels."
    )
