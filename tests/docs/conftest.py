"""A folder in which what the pages say can be done: the project's files and a tiny finished run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tiny_run import World

ROOT = Path(__file__).parents[2]
TINY = [
    "--data.languages=[de,fr]", "--data.max_train=12", "--data.max_test=6", "--base.rounds=1",
    "--federation.rounds=1", "--adapter.r_max=8", "--local.max_length=12",
    "--adapter.target_modules=all-linear", "--base.target_modules=null",
    "--data.clients_per_language=1",
    "--model.precision=fp32", "--model.device=cpu",
]  # fmt: skip


@pytest.fixture(scope="session")
def desk(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project folder of somebody who has run the quickstart, on a tiny model."""
    from fedp2eft.data.debian import load_debian
    from fedp2eft.experiment.train import train
    from fedp2eft.settings.reading import read_yaml, settings_from
    from tiny_run import write_jsonl

    folder = tmp_path_factory.mktemp("desk")
    for name in ("configs", "examples", "src", "benchmarks", "pyproject.toml", "Makefile"):
        (folder / name).symlink_to(ROOT / name)
    preset = read_yaml(ROOT / "src" / "fedp2eft" / "presets" / "quickstart.yaml")
    settings = settings_from(preset, [*TINY, f"--model.name={world.encoder}"])
    train(settings, folder / "runs" / "quickstart")
    for other in ("debian", "mine"):
        (folder / "runs" / other).symlink_to("quickstart")
    world.yaml(
        folder / "experiment.yaml", base__rounds=1, federation__rounds=1, evaluation__ranks=[2]
    )  # in the text: my/experiment.yaml
    (folder / "my").mkdir()
    (folder / "experiment.yaml").rename(folder / "my" / "experiment.yaml")
    (folder / "my" / "rows.jsonl").write_text(world.rows.read_text("utf-8"), encoding="utf-8")
    federation = load_debian(languages=["fr"], clients_per_language=1, max_train=12, max_test=6)
    (client,) = federation.pool("unseen")
    for name, numbers in (("mine", client.train), ("test", client.test)):
        found = federation.rows(numbers)
        rows = [
            {"text": text, "label": label}
            for text, label in zip(found["text"], found["label"], strict=True)
        ]
        write_jsonl(folder / f"{name}.jsonl", rows)
    facts = json.loads((folder / "runs/quickstart/psg/config.json").read_text(encoding="utf-8"))
    assert len(facts["labels"]) == 10  # the real classes, so that the pages' own files fit
    return folder
