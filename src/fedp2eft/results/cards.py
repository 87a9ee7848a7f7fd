"""Model cards: the README.md of every PSG and every adapter.

A card says what an object is, of which model and data, how good on which rows, under which licences
and how to load it. It is made from settings and counts alone: no text, no class and no client's
name is in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from fedp2eft.models.sources import OFFLINE_PARTS, ModelSource

if TYPE_CHECKING:
    from fedp2eft.generator import PSGConfig
    from fedp2eft.results.rows import Results
    from fedp2eft.settings.experiment import Settings

PAPER = "[FedP²EFT](https://arxiv.org/abs/2502.04387) (Lee et al., AAAI 2026)"
_TAGS = ["fedp2eft", "federated-learning", "lora", "peft"]
MODEL_FACTS = ("model", "revision", "base", "base_rounds", "quantize")
"""Those of `origin_of` that are of the base model, whatever data an adapter is fitted to."""
_PIPELINE = {"classification": "text-classification", "causal_lm": "text-generation"}
_LOAD = {
    "classification": """\
from peft import PeftConfig, PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

adapter = "."  # this folder
base = PeftConfig.from_pretrained(adapter).base_model_name_or_path
model = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(base), adapter)
tokenizer = AutoTokenizer.from_pretrained(base)
batch = tokenizer(["Some text."], truncation=True, max_length={length}, return_tensors="pt")
print(model.config.id2label[int(model(**batch).logits.argmax())])""",
    "causal_lm": """\
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

adapter = "."  # this folder
base = PeftConfig.from_pretrained(adapter).base_model_name_or_path
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
tokenizer = AutoTokenizer.from_pretrained(base)
batch = tokenizer(["A prompt."], return_tensors="pt")
print(tokenizer.decode(model.generate(**batch, max_new_tokens=32)[0], skip_special_tokens=True))""",
}
_PERSONALIZE = """\
from fedp2eft import PSG, personalize

psg = PSG.from_pretrained(".")  # this folder
adapter = personalize(psg, "../base", "mine.jsonl", rank={rank})  # the base it was trained with
adapter.save("my-adapter")  # loads with plain PEFT"""


def origin_of(settings: Settings, source: ModelSource) -> dict[str, Any]:
    """What a card tells of an experiment, beside what a PSG's config or an adapter's facts say.

    Args:
        settings: The experiment.
        source: The base model as it was before the experiment.
    """
    from fedp2eft.data.hub import MASAKHANEWS, XNLI
    from fedp2eft.data.registry import find

    data = settings.data
    hub = {"xnli": XNLI.path, "masakhanews": MASAKHANEWS.path, "hub": data.path}
    local = Path(source.name).is_dir()
    return {
        "model": "" if local else source.name,  # a folder's path is nobody's business
        "revision": source.revision,
        "base": settings.base.kind if settings.base.rounds else "none",
        "base_rounds": settings.base.rounds if settings.base.kind != "none" else 0,
        "quantize": settings.model.quantize,
        "dataset": data.dataset,
        "hub_dataset": hub.get(data.dataset) or "",
        "data_licence": find(data).licence,
    }


def adapter_card(facts: Mapping[str, Any]) -> ModelCard:
    """The card of an adapter folder.

    Args:
        facts: What its fedp2eft.json says.
    """
    origin = _mapping(facts.get("origin"))
    ranks = _mapping(facts.get("ranks"))
    task = "causal_lm" if facts.get("task") == "causal_lm" else "classification"
    scored = _score(facts)
    language = str(facts.get("language") or "")
    data = _front(
        origin,
        [language] if language else [],
        library_name="peft",
        pipeline_tag=_PIPELINE[task],
        **({"base_model_relation": "adapter"} if origin.get("model") else {}),
    )
    if scored:
        kind, value = scored
        data.model_name, data.metrics = "adapter", [kind]
        data.eval_results = [_result(origin, task, kind, value, "one client")]
    kept = sum(1 for rank in ranks.values() if rank)
    rows = f": {facts['train_rows']} rows" if facts.get("train_rows") else ""
    score = "Not scored."
    if scored:
        shown = f"{100 * scored[1]:.1f} %" if scored[0] == "accuracy" else f"{scored[1]:.3f} nats"
        score = (
            f"{scored[0].replace('_', ' ').capitalize()} {shown} on {facts.get('test_rows')} test "
            "rows of the same client."
        )
    body = f"""\
# A client's own adapter

An ordinary PEFT LoRA adapter that {PAPER} made for one client of a federation: a network trained by
all clients chose which ranks of which layers this client gets, and only those were trained, on this
client's text.

| | |
|---|---|
| base model | {_base(origin, facts.get("base_revision"))} |
| method | {facts.get("method", "fedp2eft")}, rank budget r = {facts.get("rank", "unknown")} |
| ranks | {sum(ranks.values())} in {kept} of {len(ranks)} layers, layout {facts.get("layout")} |
| trained on | one client's text{rows}, at most {facts.get("max_length", "unknown")} tokens each |
| data set | {origin.get("dataset", "the client's own rows")} |
| language | {language or "not told"} |
| score | {score} |

## Load it

```python
{_LOAD[task].format(length=facts.get("max_length", 128))}
```

{_remarks(origin)}"""
    return _card(data, body)


def psg_card(config: PSGConfig, results: Results | None = None) -> ModelCard:
    """The card of a PSG folder.

    Args:
        config: The PSG's.
        results: The run's tables, where clients were scored.
    """
    origin = config.origin
    told = origin.get("languages")
    languages = [str(name) for name in told] if isinstance(told, list) else []
    data = _front(origin, languages, library_name="fedp2eft", pipeline_tag=_PIPELINE[config.task])
    rows = [row for row in results.rows if row.method == "fedp2eft"] if results else []
    if rows:
        data.model_name, data.metrics = "psg", [rows[0].metric.replace(" ", "_")]
        data.eval_results = [
            _result(
                origin, config.task, row.metric.replace(" ", "_"), row.mean,
                f"{row.pool} clients, r = {row.rank}",
            )
            for row in rows
        ]  # fmt: skip
    body = f"""\
# A personalization-strategy generator

The network of {PAPER}: from statistics of a client's text inside the frozen base model it predicts
λ, a number for each of {len(config.layer_names)} layers × {config.r_max} ranks. A client keeps the
largest for its budget and trains an ordinary PEFT LoRA adapter of just those. It holds no text: it
was trained by federated averaging, and only its weights travelled.

| | |
|---|---|
| base model | {_base(origin, config.base_revision)} |
| rank budgets | any r from 1 to {config.r_max} |
| trained on | data set {origin.get("dataset", "unknown")}, {origin.get("clients", "unknown")} \
clients, {origin.get("rounds", "unknown")} rounds |
| languages | {", ".join(languages) or "not told"} |
| a client's rows | columns {", ".join(config.text_columns)} and \
{config.target_column or config.label_column}, at most {config.max_length} tokens |
| profile | {config.profile} |

{_table(results)}## Load it

```python
{_PERSONALIZE.format(rank=min(8, config.r_max))}
```

{_remarks(origin)}"""
    return _card(data, body)


def _front(origin: Mapping[str, Any], languages: list[str], **more: Any) -> ModelCardData:
    """The YAML front matter. Hub languages are ISO codes without a country."""
    codes = sorted({name.split("_")[0] for name in languages if name != "und"})
    return ModelCardData(
        base_model=origin.get("model") or None,
        language=codes or None,
        datasets=[origin["hub_dataset"]] if origin.get("hub_dataset") else None,
        license="other",
        license_name="of-the-base-model-and-the-data",
        tags=list(_TAGS),
        **more,
    )


def _result(
    origin: Mapping[str, Any], task: str, metric: str, value: float, whose: str
) -> EvalResult:
    name = str(origin.get("dataset") or "rows of the client")
    return EvalResult(
        task_type=_PIPELINE[task],
        dataset_type=str(origin.get("hub_dataset") or name),
        dataset_name=name,
        dataset_split="test",
        dataset_config=whose,
        metric_type=metric,
        metric_value=value,
    )


def _base(origin: Mapping[str, Any], revision: object) -> str:
    name = str(origin.get("model") or "a local model")
    kind, rounds = origin.get("base", "none"), origin.get("base_rounds")
    trained = f", then {rounds} federated rounds ({kind})" if rounds else ""
    before = origin.get("revision", "unknown")
    return f"{name} at revision `{before}`{trained}; its weights hash to `{revision}`"


def _score(facts: Mapping[str, Any]) -> tuple[str, float] | None:
    for name in ("accuracy", "response_loss"):
        if isinstance(facts.get(name), int | float):
            return name, float(facts[name])
    return None


def _table(results: Results | None) -> str:
    if results is None or not results.rows:
        return ""
    from fedp2eft.results.metrics import METRICS

    metric = METRICS[results.rows[0].metric]
    unit = "%" if metric.higher else "nats per token"
    lines = [
        f"## Scores\n\n{metric.name.capitalize()} ({unit}) on the clients' own test rows, mean of "
        "the languages and the worst of them. One seed.\n",
        "| clients | method | rank | worst language | mean |\n|---|---|--:|--:|--:|",
    ]
    lines += [
        f"| {row.pool} ({row.clients}) | {row.method} | {row.rank or '–'} | "
        f"{metric.shown(row.worst_language)} | {metric.shown(row.mean)} |"
        for row in results.rows
    ]
    return "\n".join(lines) + "\n\n"


def _remarks(origin: Mapping[str, Any]) -> str:
    revision, name = origin.get("revision"), str(origin.get("model") or "")
    part = OFFLINE_PARTS.get(name)
    licence = part.licence if part else f"see {name}'s page" if name else "not known here"
    data = origin.get("data_licence", "yours")
    data = "its owners'" if data in ("yours", "theirs") else data
    text = f"""\
## Licences

Base model: {licence}. Data: {data}. Read both before you pass this on.
"""
    if part and part.revision == revision:
        text += f"""
## A 4-bit copy

The base was made from the Python package {revision}, which holds the weights of {name} rounded to
4 bits, expanded to fp32 again. Scores are close to, and not equal to, those with the original
model; use this with weights of the hash above, not with the original's.
"""
    if origin.get("quantize", "none") != "none":
        text += f"""
It was trained on the base in {origin["quantize"]} (bitsandbytes).
"""
    return text


def _card(data: ModelCardData, body: str) -> ModelCard:
    return ModelCard(f"---\n{data}\n---\n\n{body}")


def _mapping(value: object) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}
