"""Adapter folders in another layout, each compared with what it was made of before it is kept."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fedp2eft.adapters.export import (
    CONFIG_FILE,
    FACTS_FILE,
    WEIGHTS_FILE,
    Layout,
    adapter_facts,
    auto_mapping,
    check_replaceable,
    load_adapter,
    save_adapter,
)
from fedp2eft.adapters.weights import AdapterWeights
from fedp2eft.errors import UserError, first_line
from fedp2eft.files import read_json
from fedp2eft.models.fit import class_names, is_generic, longest_input, vocabulary_size
from fedp2eft.models.loading import load_base, load_config, load_tokenizer, save_model, stored_dtype
from fedp2eft.models.sources import ModelSource, hash_weights, resolve_model
from fedp2eft.settings.experiment import TaskName

logger = logging.getLogger(__name__)
TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Most by which logits may differ, as a share of 1 + the largest, by dtype of the weights."""
_NOISE = 1e-5  # rounding of float32 products, as a share of the same
_ROWS, _LENGTH = 4, 16


def change_layout(
    adapter: str | Path,
    out: str | Path,
    layout: Layout,
    model: str | None,
    card: Callable[[Mapping[str, Any]], object],
) -> None:
    """Write a PEFT folder as another one; compared by weights alone if the base is not at hand."""
    weights, config, facts = load_adapter(adapter), _config(adapter), adapter_facts(adapter)
    check_replaceable(Path(out).expanduser())
    base, loads, check = model or str(config.base_model_name_or_path), config.auto_mapping, None
    try:
        source = resolve_model(base)
    except UserError:
        logger.warning("The base model %s is not available: only the weights are compared.", base)
    else:
        probe = _Probe.of(adapter, weights, source, _task(config))
        loads = probe.loads

        def check(made: Path) -> None:
            new = with_adapter(load_base(source, _task(config)), made)
            probe.check(new, torch.float32, f"{out} ({layout})")

    revision = facts.get("base_revision")
    save_adapter(
        weights,
        out,
        base=base,
        revision=str(revision) if revision else None,
        layout=layout,
        task_type=config.task_type,
        loads=loads,
        facts={k: v for k, v in facts.items() if k not in ("layout", "base_revision", "ranks")},
        card=card,
        check=check,
    )


def merge(
    adapter: str | Path,
    out: str | Path,
    model: str | None,
    precision: Literal["base", "fp32", "bf16"],
) -> None:
    """Write the full model with the adapter in its weights, in the dtype of the base."""
    weights, config, target = load_adapter(adapter), _config(adapter), Path(out).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists and is not empty: name another folder.")
    source, task = resolve_model(model or str(config.base_model_name_or_path)), _task(config)
    probe = _Probe.of(adapter, weights, source, task)
    named = {"fp32": torch.float32, "bf16": torch.bfloat16}
    dtype = stored_dtype(source) if precision == "base" else named[precision]
    whole = load_base(source, task)
    untie(whole, weights)
    # Added up in float32 and rounded once.
    whole = with_adapter(whole, adapter).merge_and_unload().to(dtype)

    def check(made: Path) -> None:
        new = load_base(ModelSource(str(target), str(made), ""), task)
        probe.check(new, dtype, f"{target} (merged)")

    # What `evaluate` goes by: columns and max_length. Not the tokenizer's model_max_length, which
    # inference servers take for the longest prompt and answer together.
    facts = {FACTS_FILE: {**adapter_facts(adapter), "layout": "merged"}}
    save_model(target, whole, load_tokenizer(source), facts, check)


def _config(adapter: str | Path) -> Any:
    from peft import LoraConfig

    return LoraConfig.from_pretrained(str(Path(adapter).expanduser()))


def _task(config: Any) -> Literal["classification", "causal_lm"]:
    return "causal_lm" if config.task_type == "CAUSAL_LM" else "classification"


@dataclass(frozen=True)
class _Probe:
    """Rows, and what base and adapter make of them.

    Args:
        rows: Tokens.
        wanted: Logits of base and adapter.
        plain: Logits of the base alone.
        loads: The base's class, as PEFT names it.
    """

    rows: list[list[int]]
    wanted: Tensor
    plain: Tensor
    loads: dict[str, str]

    @classmethod
    def of(
        cls,
        adapter: str | Path,
        weights: AdapterWeights,
        source: ModelSource,
        task: Literal["classification", "causal_lm"],
    ) -> _Probe:
        """Load base and adapter, and compute."""
        check_same_base(adapter, source, task)
        base = load_base(source, task)
        loads = auto_mapping(base)
        own = [int(token) for each in weights.rows for token in each.rows]
        rows = probe_rows(base, load_tokenizer(source), own)
        plain = outputs_on(base, rows)
        return cls(rows, outputs_on(with_adapter(base, adapter), rows), plain, loads)

    def check(self, made: Any, dtype: torch.dtype, what: str) -> None:
        """Raise `UserError` unless a model whose weights are of that dtype computes the same."""
        check_same(outputs_on(made, self.rows), self.wanted, self.plain, dtype, what)


def with_adapter(base: Any, adapter: str | Path) -> Any:
    """Return PEFT's model of a base and an adapter folder.

    Raises:
        UserError: The folder is damaged or does not fit the base.
    """
    from peft import PeftModel, get_peft_model_state_dict

    try:
        model = PeftModel.from_pretrained(base, str(Path(adapter).expanduser()))
        wanted = set(get_peft_model_state_dict(model, save_embedding_layers=False))
        found = set(load_file(Path(adapter).expanduser() / WEIGHTS_FILE))
        # Others' adapters may bring weights of the base, those of an embedding that they adapt.
        odd = (wanted - found) | (found - wanted - set(model.state_dict()))
        if odd:  # which PEFT passes over with a warning
            raise ValueError(f"{sorted(odd)[0]} is on one side only")
        return model
    except Exception as error:  # PEFT raises whatever a damaged or foreign folder leads to
        raise UserError(
            f"Adapter {adapter} is damaged or does not fit this base model ({first_line(error)})."
        ) from error


def untie(model: Any, weights: AdapterWeights) -> None:
    """Give the output head weights of its own where the adapter changes one of a tied pair.

    Merged into the shared matrix, the change of the head would change the embedding too, and that
    of the embedding the head.
    """
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    if outputs is None or outputs.weight is not inputs.weight:
        return
    changed = {layer.name for layer in weights.layers if layer.rank}
    names = {name for name, module in model.named_modules() if module in (inputs, outputs)}
    if changed & names:
        outputs.weight = nn.Parameter(outputs.weight.detach().clone())
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False


def probe_rows(model: Any, tokenizer: Any, rows: Sequence[int] = ()) -> list[list[int]]:
    """Return a few rows of tokens to compare two models of one kind on.

    Args:
        model: Tells how many tokens it knows and reads.
        tokenizer: Puts its special tokens around them.
        rows: Tokens that must be among them: those with embeddings of the client's own.
    """
    generator = torch.Generator().manual_seed(0)
    size = min(vocabulary_size(model.config) or len(tokenizer), len(tokenizer))
    length = min(_LENGTH, longest_input(model) or _LENGTH)
    drawn = torch.randint(size, (_ROWS, length), generator=generator).tolist()
    drawn[0] = [*rows[: length // 2], *drawn[0]][:length]
    texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in drawn]
    made = tokenizer(texts, truncation=True, max_length=length)["input_ids"]
    made += drawn[:1] if rows else []  # a token may not survive being written and read
    return [row for row in made if row and max(row) < size] or drawn


@torch.inference_mode()
def outputs_on(model: Any, rows: Sequence[Sequence[int]]) -> Tensor:
    """Return a model's logits on rows of tokens, one after the other, float32."""
    model.eval()
    return torch.cat(
        [model(input_ids=torch.tensor([row])).logits.float().flatten() for row in rows]
    )


def check_same(made: Tensor, wanted: Tensor, plain: Tensor, dtype: torch.dtype, what: str) -> None:
    """Raise `UserError` unless a model computes what it was made of.

    Args:
        made: Its logits.
        wanted: Those of base and adapter.
        plain: Those of the base alone.
        dtype: Of its weights.
        what: Names it in the error.
    """
    scale = 1 + float(wanted.abs().max())
    apart, effect = float((made - wanted).abs().max()), float((plain - wanted).abs().max())
    if apart <= _NOISE * scale:
        return
    if not apart <= TOLERANCE.get(dtype, 0.0) * scale:  # NaN is refused too
        raise UserError(
            f"{what} differs from base and adapter by {apart:.2g} in its logits (the adapter "
            f"itself changes them by {effect:.2g}): not kept. Please report it; the adapter "
            "folder is unharmed."
        )
    if apart > effect:
        raise UserError(
            f"{what} would lose the adapter in the rounding of {str(dtype).removeprefix('torch.')} "
            f"(off by {apart:.2g}; the adapter changes logits by {effect:.2g}): not kept. Export "
            "with --precision fp32."
        )


def check_same_base(adapter: str | Path, source: ModelSource, task: TaskName) -> None:
    """Raise `UserError` unless an adapter was made for this base model, its task and its classes.

    Of an adapter that others wrote, not all can be known: one warning says what is not.
    """
    # Safetensors only: PEFT would also take a pickled file.
    folder = Path(adapter).expanduser()
    if not all((folder / name).is_file() for name in (CONFIG_FILE, WEIGHTS_FILE)):
        raise UserError(f"No PEFT adapter in {adapter}: name an adapter folder.")
    config, facts = read_json(folder / CONFIG_FILE), adapter_facts(adapter)
    config = config if isinstance(config, dict) else {}  # PEFT refuses it
    kind = config.get("task_type")
    if kind is not None and kind != {"classification": "SEQ_CLS", "causal_lm": "CAUSAL_LM"}[task]:
        raise UserError(
            f"Adapter {adapter} has PEFT's task type {kind}, and the rows are for "
            f"{task.replace('_', ' ')}: give target_column for a causal LM alone."
        )
    wanted = facts.get("base_revision")
    if not wanted:
        logger.warning(
            "Adapter %s has no %s that names its base model's weights: only the names and sizes of "
            "its layers are compared with %s (%s says it was made for %s).",
            adapter, FACTS_FILE, source.name, CONFIG_FILE, config.get("base_model_name_or_path"),
        )  # fmt: skip
    if wanted and wanted != (found := hash_weights(Path(source.path))):
        raise UserError(
            f"Adapter {adapter} was made for another base model: its weights hash to {wanted}, "
            f"those of {source.name} to {found}."
        )
    labels = facts.get("labels")
    names = class_names(load_config(source))
    if isinstance(labels, list) and labels and not is_generic(names) and tuple(labels) != names:
        raise UserError(
            f"Adapter {adapter} was made for the classes {', '.join(map(str, labels))}, and "
            f"{source.name} has {', '.join(names)}: use the base that it was made for."
        )
