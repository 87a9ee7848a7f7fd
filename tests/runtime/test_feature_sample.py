"""ξ of a workspace's client, from all of its rows or from a sample of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fedp2eft
from fedp2eft.client.training import features, structure
from fedp2eft.errors import UserError
from fedp2eft.experiment.train import train
from fedp2eft.runtime.workspace import Workspace
from fedp2eft.seeding import derive_seed
from fedp2eft.settings.experiment import GeneratorSettings
from tiny_run import World, write_jsonl

CLIENT = "fr-unseen-00"
SAMPLE = 24


def workspace_of(world: World, folder: Path, **changes: object) -> Workspace:
    return Workspace(world.settings(generator__feature_tokens=SAMPLE, **changes), folder)


def test_a_sample_of_rows_gives_xi_and_the_count_of_rows_stays(finished, world: World) -> None:
    workspace = workspace_of(world, finished.folder, generator__log_quantity=True)
    data = workspace.encoded(CLIENT, "train")
    rows = data.sample(SAMPLE, derive_seed("feature rows", workspace.settings.generator.seed))
    assert len(rows) < len(data)
    *xi, log_n = workspace.features(CLIENT)
    want = features(workspace.bt, workspace.task, rows, workspace.settings.local, workspace.profile)
    assert torch.equal(torch.stack(xi), want)
    assert log_n == torch.tensor(float(len(data))).log()


def test_more_tokens_than_a_client_has_are_all_of_them(finished, world: World) -> None:
    plenty = world.settings(generator__feature_tokens=100_000)
    sampled = Workspace(plenty, finished.folder).features(CLIENT)
    assert torch.equal(sampled, Workspace(world.settings(), finished.folder).features(CLIENT))


def test_personalize_samples_as_the_psg_was_trained(world: World, tmp_path: Path) -> None:
    train(world.settings(generator__feature_tokens=SAMPLE), tmp_path / "run")
    psg = fedp2eft.PSG.from_pretrained(tmp_path / "run" / "psg")
    assert psg.config.generator.feature_tokens == SAMPLE
    rows = write_jsonl(tmp_path / "rows.jsonl", world.client_rows(CLIENT, "train"))
    adapter = fedp2eft.personalize(psg, tmp_path / "run" / "base", rows, 2, precision="fp32")
    lam, keep = structure(psg, workspace_of(world, tmp_path / "run").features(CLIENT), 2)
    for row, layer in enumerate(adapter.weights.layers):
        torch.testing.assert_close(layer.lam, lam[row][keep[row]])


@pytest.mark.parametrize("tokens", [0, -1])
def test_a_sample_of_nothing_is_an_error(tokens: int) -> None:
    with pytest.raises(UserError, match=r'feature_tokens is .*give 1 or more, or "all"'):
        GeneratorSettings(feature_tokens=tokens)
