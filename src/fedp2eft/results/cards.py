"""Model cards: the README.md of every base model, PSG and adapter, from those in templates/.

A card says what an object is, of which model and data, how good on which rows, under which licences
and how to load it. It is made from settings and counts alone: no text, no class and no client's
name is in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from fedp2eft.models.sources import OFFLINE_PARTS, ModelSource, is_hub_id
from fedp2eft.results.at_budget import AtBudget
from fedp2eft.results.metrics import METRICS

if TYPE_CHECKING:
    from fedp2eft.generator import PSGConfig
    from fedp2eft.results.rows import Results, Row
    from fedp2eft.settings.experiment import Settings

PAPER = "[FedP²EFT](https://arxiv.org/abs/2502.04387) (Lee et al., AAAI 2026)"
MODEL_FACTS = ("model", "revision", "base", "base_rounds", "quantize")
"""Those of `origin_of` that are of the base model, whatever data an adapter is fitted to."""
_TAGS = ["fedp2eft", "federated-learning", "lora", "peft"]
_PIPELINE = {"classification": "text-classification", "causal_lm": "text-generation"}
_AUTO = {
    "classification": "AutoModelForSequenceClassification",
    "causal_lm": "AutoModelForCausalLM",
}

_SOURCES = {
    "counts": "summed label counts of the seen clients",
    "predicted": "mean prediction of the base model over the seen clients' text",
    "uniform": "taken as uniform",
}
_MOST_SHARES = 20


def origin_of(settings: Settings, source: ModelSource) -> dict[str, Any]:
    """Return what a card needs of an experiment beside a PSG's config or an adapter's facts.

    Args:
        settings: The experiment.
        source: The base model as it was before the experiment.
    """
    from fedp2eft.data.known import KNOWN
    from fedp2eft.data.registry import find

    data = settings.data
    hub = {name: known.path for name, known in KNOWN.items()}
    if data.dataset == "hub" and not Path(data.path or "").expanduser().is_dir():
        hub["hub"] = data.path or ""
    local = Path(source.name).is_dir()
    return {
        "model": "" if local else source.name,  # a folder's path is nobody's business
        "revision": source.revision,
        "base": settings.base.kind if settings.base.rounds else "none",
        "base_rounds": settings.base.rounds if settings.base.kind != "none" else 0,
        "quantize": settings.model.quantize,
        "dataset": ", ".join([data.dataset, *data.ablations]),
        "hub_dataset": hub.get(data.dataset) or "",
        "data_licence": find(data).licence,
    }


def adapter_card(facts: Mapping[str, Any]) -> ModelCard:
    """Return the card of an adapter folder.

    Args:
        facts: What its fedp2eft.json says, and `base`, the name or folder of the base model.
    """
    origin = _mapping(facts.get("origin"))
    task = "causal_lm" if facts.get("task") == "causal_lm" else "classification"
    language = str(facts.get("language") or "")
    data = _front(origin, [language] if language else [], task, "peft")
    if is_hub_id(name := str(facts.get("base") or "")):
        data["base_model"] = name
    if model := data["base_model"]:  # as PEFT's own cards have it
        data["base_model_relation"] = "adapter"
        data["tags"] = [*_TAGS, f"base_model:adapter:{model}"]
    score = ""
    kind = next((name for name in ("accuracy", "response_loss") if _is_number(facts.get(name))), "")
    if kind:
        value = float(facts[kind])
        score = f"{100 * value:.1f} %" if kind == "accuracy" else f"{value:.3f} nats"
        score = f"{kind.replace('_', ' ').capitalize()} {score}"
        data.model_name, data.metrics = "adapter", [kind]
        data.eval_results = [_result(origin, task, kind, value, "one client")]
    return _card(
        "adapter.md",
        data,
        origin,
        facts.get("base_revision"),
        facts=facts,
        ranks=list(_mapping(facts.get("ranks")).values()),
        language=language,
        score=score,
        auto=_AUTO[task],
        max_length=facts.get("max_length", 128),
    )


def psg_card(config: PSGConfig, results: Results | None = None) -> ModelCard:
    """Return the card of a PSG folder.

    Args:
        config: The PSG's.
        results: The run's tables, if clients were scored.
    """
    rows = results.rows if results else ()
    data = _front(config.origin, _languages(config), config.task, "fedp2eft")
    _add_scores(data, "psg", config, [row for row in rows if row.method == "fedp2eft"])
    return _run_card(
        "psg.md",
        data,
        config,
        rows,
        layers=len(config.layer_names),
        r_max=config.adapter.r_max,
        profile=config.profile,
        prior=_prior(config),
        choices=_choices(config),
    )


def base_card(config: PSGConfig, results: Results | None = None) -> ModelCard:
    """Return the card of a run's own base model.

    Args:
        config: That of the PSG that was trained on it.
        results: The run's tables, if clients were scored.
    """
    rows = [row for row in results.rows if row.method == "base"] if results else []
    data = _front(config.origin, _languages(config), config.task, "transformers")
    data["tags"] = [tag for tag in _TAGS if tag not in ("lora", "peft")]
    if data["base_model"] and config.origin.get("base_rounds"):
        data["base_model_relation"] = "finetune"
    _add_scores(data, "base", config, rows)
    return _run_card("base.md", data, config, rows, auto=_AUTO[config.task])


def _run_card(
    template: str, data: ModelCardData, config: PSGConfig, rows: Sequence[Row], **values: Any
) -> ModelCard:
    """Return a card of what a whole federation made; `rows` are what its table shows."""
    answer = config.target_column or config.label_column
    return _card(
        template,
        data,
        config.origin,
        config.base_revision,
        languages=_languages(config),
        columns=f"{', '.join(config.text_columns)} and {answer}",
        max_length=config.local.max_length,
        rows=rows,
        metric=METRICS[rows[0].metric] if rows else None,
        **values,
    )


def _languages(config: PSGConfig) -> list[str]:
    """Return the seen clients' languages."""
    names = config.origin.get("languages")
    return [str(name) for name in names] if isinstance(names, list) else []


def _add_scores(data: ModelCardData, name: str, config: PSGConfig, rows: Sequence[Row]) -> None:
    """Put the scores of a run's pools into the front matter, where the hub looks for them."""
    if not rows:
        return
    metric = rows[0].metric.replace(" ", "_")
    data.model_name, data.metrics = name, [metric]
    data.eval_results = [
        _result(
            config.origin,
            config.task,
            metric,
            row.mean,
            f"{row.pool} clients{f', r = {row.rank}' if row.rank else ''}",
        )
        for row in rows
    ]


def _prior(config: PSGConfig) -> str:
    """Return where q comes from, and q itself unless it has too many classes for a line."""
    q = config.label_prior
    if not q:
        return ""
    shares = ", ".join(f"{value:.3f}" for value in q)
    if len(q) > _MOST_SHARES:
        shares = f"{len(q)} shares from {min(q):.3g} to {max(q):.3g}"
    return f"{_SOURCES[config.local.label_prior]}: {shares} (in the order of class ids)"


def _choices(config: PSGConfig) -> list[tuple[str, str]]:
    """Return what method auto chose for each budget."""
    from fedp2eft.methods.auto.candidate import Candidate

    found = []
    for name, kept in config.choices.items():
        at = AtBudget.parse(name)
        if at and at.method == "auto":
            unit = " (in parameters)" if at.budget == "parameters" else ""
            found.append((at.budget, at.rank, unit, str(Candidate.of(kept["chosen"]))))
    return [(f"{rank}{unit}", choice) for _, rank, unit, choice in sorted(found)]


def _front(
    origin: Mapping[str, Any], languages: list[str], task: str, library: str
) -> ModelCardData:
    """Return the YAML front matter. Hub languages are ISO codes without a country."""
    codes = sorted({name.split("_")[0] for name in languages if name != "und"})
    return ModelCardData(
        base_model=origin.get("model") or None,
        language=codes or None,
        datasets=[origin["hub_dataset"]] if origin.get("hub_dataset") else None,
        license="other",
        license_name="of-the-base-model-and-the-data",
        tags=list(_TAGS),
        library_name=library,
        pipeline_tag=_PIPELINE[task],
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


def _card(
    template: str, data: ModelCardData, origin: Mapping[str, Any], revision: object, **values: Any
) -> ModelCard:
    """Fill a template in; `values` are what only this kind of card shows."""
    name = str(origin.get("model") or "")
    part = OFFLINE_PARTS.get(name)
    licence = origin.get("data_licence", "yours")
    environment = Environment(
        loader=PackageLoader("fedp2eft.results"), undefined=StrictUndefined, trim_blocks=True,
        keep_trailing_newline=True, autoescape=False,
    )  # fmt: skip
    environment.filters["cell"] = lambda value: " ".join(str(value).split()).replace("|", "\\|")
    text = environment.get_template(template).render(
        front=data,
        paper=PAPER,
        base=_base(origin, revision),
        origin=origin,
        licence=part.licence if part else f"see {name}'s page" if name else "not known here",
        data_licence="its owners'" if licence in ("yours", "theirs") else licence,
        copy_of=name if part and part.revision == origin.get("revision") else "",
        **values,
    )
    return ModelCard(text)


def _mapping(value: object) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)
