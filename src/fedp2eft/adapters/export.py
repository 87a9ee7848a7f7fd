"""Adapters on disk: folders that plain PEFT and inference servers load.

λ and s are folded into B, so the scale is exactly 1. Layouts:

* `portable`: every module padded with zeros to the largest kept rank R, r = lora_alpha = R and no
  patterns. Servers that apply one rank and one scale to the whole adapter (vLLM, SGLang), PEFT
  hot-swapping and mixed batches load it as it is.
* `compact`: the true ranks, by `rank_pattern` and `alpha_pattern`; modules without ranks left out.

With a label prior (`fedp2eft.adapters.head`) the folder also has the whole head, as PEFT's
`modules_to_save`. A client's own embedding rows go with its adapter as PEFT's
`trainable_token_indices`, in both layouts. PEFT loads and merges both; a server that knows LoRA
alone needs the merged model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import pad

from fedp2eft.adapters.gates import PEFT_PREFIX
from fedp2eft.adapters.head import read_head
from fedp2eft.adapters.weights import AdapterWeights, EmbeddingRows, LayerWeights
from fedp2eft.errors import UserError
from fedp2eft.files import read_json, write_folder

Layout = Literal["portable", "compact"]
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
FACTS_FILE = "fedp2eft.json"
_MORE = ("use_dora", "use_rslora", "bias")
"""What makes a PEFT adapter more than B·A."""
PEFT_TASKS = {"classification": None, "causal_lm": "CAUSAL_LM"}
"""PEFT's task type by task; None for classification, whose head is adapted, not saved."""


def save_adapter(
    weights: AdapterWeights,
    folder: str | Path,
    *,
    base: str,
    revision: str | None = None,
    layout: Layout = "portable",
    task_type: str | None = None,
    loads: Mapping[str, str] | None = None,
    facts: dict[str, object] | None = None,
    card: Callable[[Mapping[str, Any]], object] | None = None,
    check: Callable[[Path], None] | None = None,
) -> Path:
    """Write a PEFT adapter folder; an existing one is replaced only when the new one is whole.

    Args:
        weights: The adapter.
        folder: Where to.
        base: Name or folder of the base model, for `base_model_name_or_path`.
        revision: Revision of the base model.
        layout: "portable" or "compact".
        task_type: PEFT's task type, from `PEFT_TASKS`.
        loads: The class of the base model, from `auto_mapping`, for PEFT's `AutoPeftModel`.
        facts: Anything JSON to keep beside it in fedp2eft.json.
        card: Makes the text of README.md from what fedp2eft.json says (`results.cards`).
        check: Looks at the new folder before it is kept; whatever it raises, nothing is.

    Returns:
        The folder.

    Raises:
        UserError: The adapter has values that are not finite, what was written does not read back
            as the adapter, or the disk is full.
    """
    if not weights.is_finite():
        raise UserError(f"Adapter for {folder} holds NaN or infinity: not saved.")
    # Fold λ and the scale into B, so that the folder needs a scale of 1 and no λ.
    folded = weights.folded()
    R = folded.max_rank
    # PEFT wants a layer to adapt: of an adapter without ranks one layer stands there with zeros.
    kept = [x for x in folded.layers if x.rank or layout == "portable"] or [*folded.layers[:1]]
    tensors = {}
    for layer in kept:
        width = R - layer.rank if layout == "portable" or not layer.rank else 0
        a, b = _keys(layer.name, layer.embedding)
        tensors[a] = pad(layer.A, (0, 0, 0, width)).contiguous()
        tensors[b] = pad(layer.B, (0, width)).contiguous()
    for each in weights.rows:
        tensors[_rows_key(each.name)] = each.values.contiguous()
    if weights.head:
        tensors[f"{PEFT_PREFIX}{weights.head.name}.weight"] = weights.head.weight.contiguous()
        tensors[f"{PEFT_PREFIX}{weights.head.name}.bias"] = weights.head.bias.contiguous()
    # PEFT takes the first pattern that ends a name; "^" tells `dense` from `output.dense`.
    ranks = {"^" + re.escape(layer.name): layer.rank for layer in kept if 0 < layer.rank != R}
    compact = layout == "compact"
    # alpha = r makes PEFT's own scale 1.
    config = LoraConfig(
        r=R,
        lora_alpha=R,
        rank_pattern=ranks if compact else {},
        alpha_pattern=ranks if compact else {},
        target_modules=[layer.name for layer in kept],
        lora_dropout=0.0,
        bias="none",
        modules_to_save=[weights.head.name] if weights.head else None,
        trainable_token_indices={each.name: each.rows.tolist() for each in weights.rows} or None,
        task_type=task_type,
        auto_mapping=dict(loads) if loads and task_type is None else None,
        inference_mode=True,
    )
    config.base_model_name_or_path = base
    config.revision = revision if revision and re.fullmatch(r"[0-9a-f]{40}", revision) else None
    recorded = {
        "layout": layout,
        "base_revision": revision,
        "ranks": weights.ranks,
        **(facts or {}),
    }
    if weights.head:
        recorded["label_prior"] = True
    # Write atomically, and only what reads back as the adapter that was trained.
    target = Path(folder).expanduser()
    check_replaceable(target)

    def write(scratch: Path) -> None:
        save_file(tensors, scratch / WEIGHTS_FILE, metadata={"format": "pt"})
        config.save_pretrained(str(scratch))
        # PEFT keeps the names as a set, whose order differs from process to process.
        written = json.loads((scratch / CONFIG_FILE).read_text(encoding="utf-8"))
        written["target_modules"] = [layer.name for layer in kept]
        text = json.dumps(written, indent=2, sort_keys=True, ensure_ascii=False)
        (scratch / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
        (scratch / FACTS_FILE).write_text(json.dumps(recorded, indent=2) + "\n", encoding="utf-8")
        if card is not None:
            text = str(card({**recorded, "base": base}))
            (scratch / "README.md").write_text(text, encoding="utf-8")
        if not _same(load_adapter(scratch), folded):
            raise UserError(f"{target} would not hold the adapter that was trained: not saved.")
        if check is not None:
            check(scratch)

    write_folder(target, write)
    return target


def auto_mapping(model: object) -> dict[str, str]:
    """Return how PEFT names the class of a base model, so that `AutoPeftModel` finds it again."""
    return {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}


def _same(read: AdapterWeights, folded: AdapterWeights) -> bool:
    """Return whether an adapter that was read back is the folded one, ranks of zeros aside."""
    one, other = _content(read), _content(folded)
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def _content(weights: AdapterWeights) -> dict[str, Tensor]:
    """Return all parameters of a folded adapter by name, without ranks of zeros."""
    found: dict[str, Tensor] = {}
    for layer in weights.layers:
        used = layer.A.abs().sum(dim=1) > 0
        if used.any():
            found |= {f"{layer.name} A": layer.A[used], f"{layer.name} B": layer.B[:, used]}
    for each in weights.rows:
        found |= {f"{each.name} rows": each.rows, f"{each.name} values": each.values}
    if head := weights.head:
        found |= {f"{head.name} weight": head.weight, f"{head.name} bias": head.bias}
    return found


def load_adapter(folder: str | Path) -> AdapterWeights:
    """Read a portable or compact folder back; ranks that are all zero are dropped.

    Raises:
        UserError: No adapter there, damaged, or one whose scale is not 1 (not written by this
            package).
    """
    folder = Path(folder).expanduser()
    try:
        config = LoraConfig.from_pretrained(str(folder))
        tensors = load_file(folder / WEIGHTS_FILE)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"No PEFT adapter in {folder}: a file of it is missing.") from error
    except SafetensorError as error:
        raise UserError(f"{folder / WEIGHTS_FILE} is damaged ({error}).") from error
    except Exception as error:  # whatever a config by anybody can make PEFT raise
        raise UserError(f"{folder / CONFIG_FILE} is damaged: fetch it again.") from error
    if not isinstance(config, LoraConfig) or not config.target_modules:
        raise UserError(f"{folder / CONFIG_FILE} does not describe a LoRA adapter: fetch it again.")
    same_scale = config.lora_alpha == config.r and config.alpha_pattern == config.rank_pattern
    more = [name for name in _MORE if getattr(config, name) not in (None, False, "none", [])]
    if not same_scale or more:
        odd = f"with {', '.join(more)}" if more else "of a scale that is not 1"
        raise UserError(
            f"{folder} is an adapter {odd}, and export takes those that fedp2eft writes: evaluate "
            "scores it, and PEFT's merge_and_unload merges it."
        )
    layers = []
    for name in _module_names(folder, tensors):
        embedding = f"{PEFT_PREFIX}{name}.lora_embedding_A" in tensors
        a, b = _keys(name, embedding)
        if a not in tensors:
            continue
        A, B = tensors[a], tensors.get(b)
        if B is None or not _fit(A, B):
            raise UserError(f"{folder / WEIGHTS_FILE} is damaged at {name!r}: fetch it again.")
        used = A.abs().sum(dim=1) > 0
        ones = torch.ones(int(used.sum()))
        layers.append(LayerWeights(name, A[used], B[:, used], ones, embedding))
    try:
        rows = tuple(
            EmbeddingRows(name, torch.tensor(indices), tensors[_rows_key(name)])
            for name, indices in (config.trainable_token_indices or {}).items()
        )
        head = read_head(config.modules_to_save, tensors, PEFT_PREFIX)
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder}: its embedding rows or head are incomplete: fetch it again."
        ) from error
    return AdapterWeights(tuple(layers), 1.0, rows, head=head)


def column_facts(columns: Any, task: str) -> dict[str, object]:
    """Return what fedp2eft.json says of the columns of an adapter's `ClientData` or settings."""
    answer = "label_column" if task == "classification" else "target_column"
    return {"text_columns": list(columns.text_columns), answer: getattr(columns, answer)}


def adapter_facts(folder: str | Path) -> dict[str, object]:
    """Return what fedp2eft.json says of an adapter folder; empty if absent."""
    facts = read_json(Path(folder).expanduser() / FACTS_FILE)
    return facts if isinstance(facts, dict) else {}


def _keys(name: str, embedding: bool) -> tuple[str, str]:
    stem = PEFT_PREFIX + name
    if embedding:
        return f"{stem}.lora_embedding_A", f"{stem}.lora_embedding_B"
    return f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"


def _fit(A: Tensor, B: Tensor) -> bool:
    """Return whether A (r × d_in) and B (d_out × r) are finite matrices that go together."""
    floats = A.is_floating_point() and B.is_floating_point()
    matrices = floats and A.dim() == B.dim() == 2 and A.shape[0] == B.shape[1]
    return matrices and all(bool(torch.isfinite(value.float()).all()) for value in (A, B))


def _rows_key(name: str) -> str:
    return f"{PEFT_PREFIX}{name}.token_adapter.trainable_tokens_delta"


def _module_names(folder: Path, tensors: dict[str, Tensor]) -> list[str]:
    """Return module names in the base model's order if fedp2eft.json has it, else the file's."""
    found = {
        key.removeprefix(PEFT_PREFIX).split(".lora_")[0]: None for key in tensors if ".lora_" in key
    }
    ranks = adapter_facts(folder).get("ranks")
    ordered = [name for name in ranks if name in found] if isinstance(ranks, dict) else []
    return ordered + [name for name in found if name not in set(ordered)]


def check_replaceable(target: Path) -> None:
    """Raise `UserError` unless an adapter may be written there: nothing, or another adapter."""
    files = [path.name for path in target.iterdir()] if target.is_dir() else []
    if target.exists() and not (target.is_dir() and (not files or CONFIG_FILE in files)):
        raise UserError(f"{target} exists and is not an adapter folder: name another folder.")
