"""Every YAML file that ships is an experiment that could be started."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

import fedp2eft
from fedp2eft.bases import BASES
from fedp2eft.data.known import KNOWN
from fedp2eft.data.languages import new_languages_of
from fedp2eft.data.registry import find, load_clients
from fedp2eft.methods import METHODS, method_named
from fedp2eft.results.plan import plan, settings_of
from fedp2eft.settings.reading import read_settings

ROOT = Path(__file__).parents[2]
FILES = sorted([*ROOT.glob("configs/**/*.yaml"), *Path(fedp2eft.__file__).parent.glob("presets/*")])
COMPARISONS = [path for path in FILES if "compare:" in path.read_text(encoding="utf-8")]


def name(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_the_file_loads_and_its_clients_exist(path: Path) -> None:
    settings = read_settings(path)
    assert find(settings.data)
    assert all(method_named(method) for method in settings.evaluation.methods)
    assert max(settings.evaluation.ranks) <= settings.adapter.r_max
    if settings.data.dataset in (*KNOWN, "fed-aya"):
        return  # their rows are on the hub, or in a file that the user fetches
    federation = load_clients(settings.data)
    for pool in settings.evaluation.pools:
        assert federation.pool(pool)
    assert all(len(client.train) and len(client.test) for client in federation.clients)


@pytest.mark.parametrize("path", COMPARISONS, ids=name)
def test_every_training_of_a_comparison_can_be_started(path: Path) -> None:
    """A dry run: every cell is planned, and every training has settings of its own."""
    settings = read_settings(path)
    cells = plan(settings)
    evaluation, varied = settings.evaluation, settings.compare
    budgets = sum(len(evaluation.ranks) if METHODS[m].ranked else 1 for m in evaluation.methods)
    bases = varied.bases or [settings.base.kind]
    places = len(bases) * len(varied.seeds) * len(evaluation.pools)
    assert len(cells) == len({cell.name for cell in cells}) == places * budgets
    for training in {cell.training for cell in cells if cell.training.seed == varied.seeds[0]}:
        made = settings_of(settings, training)
        assert made.base.kind == training.base
        assert training.base in BASES
        assert made.data.seed == training.seed
    assert varied.seeds == [42, 52, 62]
    assert f"fedp2eft compare {path.relative_to(ROOT)} --run runs/" in path.read_text("utf-8")


def test_the_papers_tables_have_the_papers_numbers() -> None:
    """15 languages × 20 clients at 128 tokens, 16 × 10 at 256; a tenth of the seen a round."""
    expected = {"xnli": (15, 20, 128, 30), "masakhanews": (16, 10, 256, 16)}
    for dataset, (languages, clients, length, sampled) in expected.items():
        on = [path for path in COMPARISONS if path.parent.name == dataset]
        paths = [path for path in on if path.stem not in ("e5-small", "auto")]
        bases: list[str] = []
        for path in paths:
            settings = read_settings(path)
            assert settings.data.dataset == dataset
            assert len(find(settings.data).languages) == languages
            assert settings.data.languages == []
            assert settings.data.clients_per_language == clients
            assert settings.data.alpha == 0.5
            assert settings.local.max_length == length
            assert settings.base.clients_per_round == sampled == languages * clients // 10
            assert settings.federation.clients_per_round == sampled
            assert settings.model.name == "google-bert/bert-base-multilingual-cased"
            assert settings.evaluation.ranks == [2, 4, 8, 16]
            bases += settings.compare.bases
        assert sorted(bases) == sorted(BASES)


def test_the_papers_table_of_causal_lms_has_the_papers_numbers() -> None:
    """3 of the 30 seen annotators a round, 4 × 4 rows a step, 1024 tokens, both models."""
    expected = {
        "mobilellama": ("mtgv/MobileLLaMA-1.4B-Base", ["fedit"]),
        "llama": ("meta-llama/Llama-3.2-3B-Instruct", ["none"]),
    }
    for stem, (model, bases) in expected.items():
        settings = read_settings(ROOT / "configs" / "fed-aya" / f"{stem}.yaml")
        assert (settings.model.name, settings.compare.bases) == (model, bases)
        assert (settings.model.task, settings.data.dataset) == ("causal_lm", "fed-aya")
        assert (settings.local.batch_size, settings.local.accumulate) == (4, 4)
        assert settings.local.max_length == 1024
        assert settings.federation.clients_per_round == 3
        assert settings.evaluation.ranks == [2, 4, 8, 16]
        assert settings.evaluation.generate
        local = settings.local
        assert (local.lr, local.lambda_lr, local.personalize_lr) == (1e-4, 1e-2, 1e-4)
    base = read_settings(ROOT / "configs" / "fed-aya" / "mobilellama.yaml").base
    assert (base.kind, base.rounds, base.steps, base.batch_size) == ("fedit", 200, 10, 4)
    assert (base.lr, base.schedule, base.clients_per_round) == (2e-5, "cosine", 3)


def test_the_debian_comparison_is_wide_enough() -> None:
    """At least eight languages in four scripts, three further ones, every method and control."""
    settings = read_settings(ROOT / "configs/debian-descriptions/comparison.yaml")
    scripts = {"ja": "Japanese", "ko": "Korean", "ru": "Cyrillic", "uk": "Cyrillic", "zh_CN": "Han"}
    assert len(settings.data.languages) >= 8
    assert len({scripts.get(language, "Latin") for language in settings.data.languages}) >= 4
    assert len(settings.data.new_languages) >= 3
    assert set(settings.evaluation.methods) == {
        name for name, method in METHODS.items() if "+" not in name and not method.texts
    }
    assert settings.evaluation.pools == ["seen", "unseen", "new-language"]


@pytest.mark.parametrize(
    ("dataset", "seen", "new"), [("masakhanews", 10, 6), ("afrisenti", 8, 2), ("sib-200", 12, 40)]
)
def test_the_suite_follows_the_papers_protocol(dataset: str, seen: int, new: int) -> None:
    """Languages that nobody trained on, equal clients, Dirichlet 0.5, ranks 2 and 8."""
    settings = read_settings(ROOT / "configs" / dataset / "e5-small.yaml")
    data, found = settings.data, find(settings.data)
    assert len(data.languages) == seen
    unknown = new_languages_of(dataset, found.languages, data)
    assert len(unknown) == new
    assert {*data.languages, *unknown} <= set(found.languages)
    assert not {*data.languages} & {*KNOWN[dataset].without_train}
    assert (data.alpha, settings.evaluation.ranks) == (0.5, [2, 8])
    assert settings.evaluation.pools == ["seen", "unseen", "new-language"]
    encoder = settings.base.target_modules, settings.adapter.target_modules
    names = [f"bert.encoder.layer.{n}" for n in range(12)]
    assert [bool(re.fullmatch(str(encoder[0]), name)) for name in names] == [False] * 8 + [True] * 4
    queries = [f"{name}.attention.self.query" for name in names]
    adapted = [bool(re.fullmatch(str(encoder[1]), name)) for name in queries]
    assert adapted == [False] * 8 + [True] * 4
    auto = read_settings(ROOT / "configs" / dataset / "auto.yaml")
    assert replace(auto.data, proportions="train") == data
    assert replace(auto.base, held_out=0.0) == settings.base
    assert auto.base.held_out == 0.25
    assert auto.tuning.lrs == [*settings.tuning.lrs, 1e-2]  # AfriSenti's best was the largest
    same = ("model", "adapter", "generator", "local", "federation")
    assert [getattr(auto, name) for name in same] == [getattr(settings, name) for name in same]


def test_the_label_prior_stands_beside_every_method_that_trains() -> None:
    """All methods with a rank budget but tuned ones and those of other settings, at 2 and 8."""
    settings = read_settings(ROOT / "configs/debian-descriptions/label-prior.yaml")
    methods = settings.evaluation.methods
    plain = {name for name in methods if f"{name}+prior" in METHODS}
    trained = {name for name in METHODS if f"{name}+prior" in METHODS}
    assert trained - plain == {
        "lora-paper", "lora-tuned", "fedp2eft-paper", "fedp2eft-tuned", "fedp2eft-layerwise"
    }  # fmt: skip
    assert {f"{name}+prior" for name in plain} <= {*methods}
    assert settings.evaluation.ranks == [2, 8]


def test_the_quickstart_is_what_it_says() -> None:
    """Three scripts, seen and unseen clients, two per language (an interval needs them)."""
    settings = read_settings(ROOT / "src/fedp2eft/presets/quickstart.yaml")
    assert settings.data.languages == ["de", "ja", "ru"]
    assert settings.data.clients_per_language == 2
    assert settings.evaluation.pools == ["seen", "unseen"]
    assert settings.evaluation.methods == [
        "majority", "base", "prior", "calibrated-prior", "lora", "fedp2eft",
    ]  # fmt: skip
    assert len(settings.evaluation.ranks) <= 2
    assert settings.local.lr == settings.local.personalize_lr
