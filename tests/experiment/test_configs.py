"""Every YAML file that ships is an experiment that could be started."""

from __future__ import annotations

from pathlib import Path

import pytest

import fedp2eft
from fedp2eft.data.settings import load_federation
from fedp2eft.methods import method_named
from fedp2eft.reading import read_yaml, settings_from

ROOT = Path(__file__).parents[2]
FILES = sorted([*ROOT.glob("configs/**/*.yaml"), *Path(fedp2eft.__file__).parent.glob("presets/*")])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_file_loads_and_its_clients_exist(path: Path) -> None:
    settings = settings_from(read_yaml(path))
    federation = load_federation(settings.data)
    for pool in settings.evaluation.pools:
        assert federation.pool(pool)
    assert all(len(client.train) and len(client.test) for client in federation.clients)
    assert all(method_named(name) for name in settings.evaluation.methods)
    assert max(settings.evaluation.ranks) <= settings.adapter.r_max


def test_the_quickstart_is_what_it_says() -> None:
    """Six languages in at least four scripts, seen and unseen clients, two budgets."""
    settings = settings_from(read_yaml(ROOT / "src/fedp2eft/presets/quickstart.yaml"))
    assert len(settings.data.languages) == 6
    assert {"de", "ja", "ko", "ru"} <= set(settings.data.languages)
    assert settings.evaluation.pools == ["seen", "unseen"]
    assert len(settings.evaluation.ranks) == 2
    assert settings.local.lr == settings.local.personalize_lr
