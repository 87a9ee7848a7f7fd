"""Warnings of PEFT and transformers: a line each where the user's numbers are concerned."""

from __future__ import annotations

import inspect
import logging
import warnings
from pathlib import Path

import pytest
from peft import peft_model
from peft.tuners import tuners_utils
from peft.utils import save_and_load

from fedp2eft.adapters.btlora import BTLora
from fedp2eft.adapters.export import save_adapter
from fedp2eft.cli import main
from fedp2eft.commands.warned import show_what_concerns_results
from fedp2eft.models.loading import load_base
from fedp2eft.models.sources import resolve_model
from fedp2eft.settings.experiment import AdapterSettings
from tiny import disturb
from tiny_chat import save_llama


@pytest.fixture(autouse=True)
def restored():
    with warnings.catch_warnings():
        yield


def test_tied_layers_are_said_once_in_one_line_and_the_merged_model_is_right(
    tmp_path: Path, caplog
):
    source = resolve_model(str(save_llama(tmp_path / "llama")))
    bt = BTLora(
        load_base(source, "causal_lm"), AdapterSettings(r_max=2, target_modules=["lm_head"])
    )
    bt.reset(1.0)
    disturb(bt)
    save_adapter(
        bt.trim(2), tmp_path / "a", base=source.path, revision=source.revision,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    caplog.clear()
    code = main(
        ["export", "--adapter", str(tmp_path / "a"), "--out", str(tmp_path / "out"), "--layout",
         "merged"]
    )  # fmt: skip
    assert code == 0
    [record] = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert "tie_word_embeddings=True" in record.message
    assert "\n" not in record.message
    assert "from_pretrained" not in record.message  # PEFT's page of example code


@pytest.mark.parametrize(
    ("warning", "shown"),
    [
        ("Found missing adapter keys while loading the checkpoint: ['a',\n 'b']", True),
        ("Some weights of Bert were not initialized from the model checkpoint", True),
        ("Unexpected keyword arguments ['new'] for class LoraConfig, these are ignored.", True),
        ("`is_gradient_checkpointing` is deprecated and will be removed", False),
        ("torch.jit.script_method is deprecated", False),
    ],
)
def test_only_what_concerns_numbers_is_shown(caplog, warning: str, shown: bool):
    show_what_concerns_results()
    for _ in range(2):
        warnings.warn(warning, stacklevel=1)
    assert caplog.messages == ([" ".join(warning.split())] if shown else [])


def test_pefts_words_are_still_those_that_are_looked_for():
    """PEFT that says it otherwise would be quiet."""
    for where, words in (
        (tuners_utils, "Model has `tie_word_embeddings=True`"),
        (tuners_utils, "Model with `tie_word_embeddings=True`"),
        (peft_model, "Found missing adapter keys"),
        (save_and_load, "Some weights of "),
    ):
        assert words in inspect.getsource(where)
