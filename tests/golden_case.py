"""Reads a golden case: numbers that the reference implementation gave, as data."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from fedp2eft.adapters.btlora import BTLora
from fedp2eft.adapters.gates import PEFT_PREFIX
from fedp2eft.generator import PSG, PSGConfig
from fedp2eft.settings.experiment import AdapterSettings, GeneratorSettings, LocalSettings
from fedp2eft.tasks.classification import Classification
from fedp2eft.tasks.encoded import Encoded

SHIPPED = Path(__file__).parent / "golden"


def case_folders() -> list[Path]:
    """Every shipped case, and every folder named in FEDP2EFT_GOLDEN (separated by ':')."""
    named = [Path(p) for p in os.environ.get("FEDP2EFT_GOLDEN", "").split(":") if p]
    return sorted(p.parent for p in SHIPPED.glob("*/golden.json")) + named


def plain(name: str) -> str:
    return name.removeprefix(PEFT_PREFIX).removesuffix(".base_layer")


@dataclass(frozen=True)
class GoldenCase:
    folder: Path
    facts: dict[str, Any]
    tensors: dict[str, Tensor]

    @classmethod
    def load(cls, folder: Path) -> GoldenCase:
        facts = json.loads((folder / "golden.json").read_text())
        return cls(folder, facts, load_file(folder / "golden.safetensors"))

    @property
    def clients(self) -> range:
        return range(len(self.facts["client_sizes"]))

    @property
    def rounds(self) -> range:
        return range(1, self.facts["rounds"] + 1)

    @property
    def max_length(self) -> int:
        return self.tensors["client0.train.input_ids"].shape[1]

    def adapter_settings(self) -> AdapterSettings:
        f = self.facts
        return AdapterSettings(
            r_max=f["r_max"],
            scaling=f["lora_scaling"],
            lambda_min=f["lambda_min"],
            lambda_max=f["lambda_max"],
        )

    def local_settings(self) -> LocalSettings:
        f = self.facts
        return LocalSettings(
            epochs=f["epochs"],
            batch_size=f["batch_size"],
            lr=f["task_lr"],
            personalize_lr=f["task_lr"],
            lambda_lr=f["lambda_lr"],
            alpha_s=f["alpha_s"],
            alpha_p=f["alpha_p"],
            max_grad_norm=f["max_grad_norm"],
        )

    def generator_settings(self) -> GeneratorSettings:
        f = self.facts
        return GeneratorSettings(
            hidden_multiplier=f["hidden_multiplier"], steps=f["psg_steps"], lr=f["psg_lr"]
        )

    def adapter(self, *, clamp_forward: bool = False, attention: str | None = None) -> BTLora:
        base = AutoModelForSequenceClassification.from_pretrained(self.folder / "model")
        if attention:
            base.set_attn_implementation(attention)
        bt = BTLora(base, self.adapter_settings(), clamp_forward=clamp_forward)
        bt.set_common_A(
            {
                plain(key.removeprefix("lora_init.").removesuffix(".lora_A.weight")): value
                for key, value in self.tensors.items()
                if key.startswith("lora_init.")
            }
        )
        return bt

    def psg(self, bt: BTLora) -> PSG:
        config = PSGConfig(
            adapter=self.adapter_settings(),
            generator=self.generator_settings(),
            base_model="golden",
            base_revision="golden",
            linear_names=tuple(name for name, _ in bt.linears),
            layer_names=bt.names,
        )
        psg = PSG(config)
        psg.set_phi(self.starting("psg_init."))
        return psg

    def starting(self, prefix: str) -> dict[str, Tensor]:
        return {
            key.removeprefix(prefix): value
            for key, value in self.tensors.items()
            if key.startswith(prefix)
        }

    def task(self) -> Classification:
        config = json.loads((self.folder / "model" / "config.json").read_text())
        return Classification(pad_id=config.get("pad_token_id") or 0, max_length=self.max_length)

    def data(self, client: int, split: str) -> Encoded:
        ids = self.tensors[f"client{client}.{split}.input_ids"].numpy()
        mask = self.tensors[f"client{client}.{split}.attention_mask"].numpy().astype(bool)
        labels = self.tensors[f"client{client}.{split}.labels"].numpy()
        return Encoded.from_rows(
            [row[m].tolist() for row, m in zip(ids, mask, strict=True)], labels
        )

    def order(self, key: str) -> list[np.ndarray]:
        return [np.asarray(batch) for batch in self.facts["train_batch_order"][key]]
