"""A client's round (stage 1 and 2) beside the usual arrangement, on the same rows.

    python benchmarks/client_round.py [--model all-MiniLM-L6-v2] [--rows 128] [--max-length 256]
        [--dataset debian-descriptions] [--column text] [--language en] [--runs 5]

The usual arrangement rebuilds the base model from its file for every client and round, copies it
once more to remember B0, computes ξ in batches of four each time, pads every row to the maximum
length, computes in fp32 with torch's and transformers' defaults (AdamW, attention) and sums the
penalties layer by layer. It is written plainly here, so that the ratio can be measured on any
machine.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from common import MINILM, alternate, client_rows, machine, median, model_source, spread
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F

from fedp2eft.adapters.btlora import BTLora, common_A
from fedp2eft.client.descent import local_order
from fedp2eft.client.training import features, train_round
from fedp2eft.data.debian import LABELS
from fedp2eft.generator import PSG, PSGConfig
from fedp2eft.models.loading import load_base
from fedp2eft.models.precision import resolve_precision
from fedp2eft.models.sources import ModelSource
from fedp2eft.settings.experiment import AdapterSettings, GeneratorSettings, LocalSettings
from fedp2eft.settings.profiles import PAPER
from fedp2eft.tasks.classification import Classification
from fedp2eft.tasks.encoded import Encoded


class PlainGate(nn.Module):
    """lora_A followed by its λ, as a module in lora_A's place."""

    def __init__(self, linear: nn.Linear, lam: float, r: int) -> None:
        super().__init__()
        self.linear = linear
        self.lam = nn.Parameter(torch.full((r,), lam))

    @property
    def weight(self) -> torch.Tensor:
        return self.linear.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.linear(x)) * self.lam.clamp(1e-4, 1000.0)


def usual_round(
    source: ModelSource,
    task: Classification,
    data: Encoded,
    psg: PSG,
    order: list[NDArray[Any]],
    s: LocalSettings,
    g: GeneratorSettings,
) -> torch.Tensor:
    """One client's round, the plain way; returns λ^s."""
    base = load_base(source, "classification", labels=LABELS)
    linears = [m for m in base.modules() if isinstance(m, nn.Linear)]
    moments = [[0, 0.0, 0.0] for _ in linears]

    def hook_for(row: int) -> Callable[..., None]:
        def hook(_m: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0]
            moments[row][0] += x.numel()
            moments[row][1] += float(x.sum())
            moments[row][2] += float((x * x).sum())

        return hook

    handles = [m.register_forward_pre_hook(hook_for(i)) for i, m in enumerate(linears)]
    with torch.no_grad():
        for batch in task.padded_batches(data, 4):
            batch.pop("labels")
            base(**batch)
    for handle in handles:
        handle.remove()
    xi = []
    for n, total, square in moments:
        mean = total / n
        xi += [mean, ((square - n * mean * mean) / (n - 1) + 1e-5) ** 0.5]
    with torch.no_grad():
        lam0 = psg(torch.tensor(xi))

    r = psg.config.adapter.r_max
    model = get_peft_model(base, LoraConfig(r=r, lora_alpha=2 * r, target_modules="all-linear"))
    layers = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            plain = name.removeprefix("base_model.model.")
            linear = module.lora_A["default"]
            linear.weight.data.copy_(common_A(plain, linear.weight, 0))
            module.lora_A["default"] = PlainGate(linear, 1e-4, r)
            layers[plain] = module
    for row, module in enumerate(layers.values()):
        module.lora_A["default"].lam.data.copy_(lam0[row])
    first = copy.deepcopy(model)  # remembers B0
    B0 = {n: p for n, p in first.named_parameters() if "lora_B" in n}
    gates = [m.lora_A["default"] for m in layers.values()]
    weights = [p for n, p in model.named_parameters() if "lora_" in n and not n.endswith("lam")]
    optimizer = torch.optim.AdamW(
        [{"params": weights, "lr": s.lr}, {"params": [m.lam for m in gates], "lr": s.lambda_lr}],
        weight_decay=0.0,
    )
    n = len(data)
    model.train(s.dropout)
    for rows in order:
        batch = data.batch(rows, pad_id=task.pad_id, length=task.max_length)
        labels = batch.pop("labels")
        loss = F.cross_entropy(model(**batch).logits, labels)
        for name, module in layers.items():
            lam = module.lora_A["default"].lam.clamp(1e-4, 1000.0)
            change = (
                module.lora_B["default"].weight
                - B0[f"base_model.model.{name}.lora_B.default.weight"]
            )
            loss = loss + s.alpha_s / n * (change.abs().sum(0) / lam).sum()
            loss = loss + s.alpha_p / n * (100 * lam + lam.log()).sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(weights, s.max_grad_norm)
        optimizer.step()
    target = torch.stack([m.lam.detach() for m in gates]).clamp(1e-4, 1000.0)
    stage2 = torch.optim.Adam(psg.parameters(), lr=g.lr)
    for _ in range(g.steps):
        stage2.zero_grad()
        (psg(torch.tensor(xi)) - target).abs().sum().backward()
        stage2.step()
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=MINILM)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--dataset", default="debian-descriptions", help="or libreoffice-help")
    parser.add_argument("--column", default="text", help="text, summary or title")
    parser.add_argument("--language", default="en")
    parser.add_argument("--precisions", nargs="+", default=["auto"])
    options = parser.parse_args()
    task, data, source = client_rows(
        options.rows,
        options.max_length,
        model_source(options.model),
        options.dataset,
        options.column,
        options.language,
    )
    s = LocalSettings(dropout=False, max_length=options.max_length, batch_size=options.batch_size)
    # λ⁰ = 0.5, as in the quickstart: from 1e-4 a few steps end at the lower bound in every mode.
    g, adapter = GeneratorSettings(init_lambda=0.5), AdapterSettings()
    order = list(local_order(len(data), s.epochs, s.batch_size, 0))
    adapters = {
        dtype: BTLora(
            load_base(source, "classification", labels=LABELS, dtype=dtype,
                      max_length=options.max_length),
            adapter,
        )
        for dtype in {resolve_precision(name, "cpu") for name in options.precisions}
    }  # fmt: skip
    bt = next(iter(adapters.values()))
    psg = PSG(
        PSGConfig(
            adapter=adapter, generator=g, base_model="b", base_revision="r", layer_names=bt.names,
            linear_names=tuple(name for name, _ in bt.linears),
        )
    )  # fmt: skip
    phi = psg.phi()
    lam: dict[str, torch.Tensor] = {}

    def ours(name: str, bt: BTLora, xi: torch.Tensor) -> Callable[[], None]:
        def run() -> None:
            psg.set_phi(phi)
            lam[name] = train_round(bt, task, data, xi, psg, list(order), s, g, PAPER).lam

        return run

    def usual() -> None:
        psg.set_phi(phi)
        lam["usual"] = usual_round(source, task, data, psg, order, s, g)

    modes = {
        f"ours_{str(dtype).removeprefix('torch.')}": ours(
            str(dtype), bt, features(bt, task, data, s, PAPER)
        )
        for dtype, bt in adapters.items()
    }
    seconds = alternate(options.runs, usual=usual, **modes)
    print(machine())
    print(
        f"{options.model}: {len(data)} rows of {data.lengths.mean():.0f} tokens on average, "
        f"at most {options.max_length}; r_max {adapter.r_max}; {len(order)} steps"
    )
    for name, values in seconds.items():
        ratio = median([a / b for a, b in zip(seconds["usual"], values, strict=True)])
        print(f"{name:>16}: {spread(values)}, {ratio:.1f}× the usual arrangement")
    plain = lam.pop("usual")
    moved = float((plain - 0.5).abs().mean())
    for name, value in lam.items():
        apart = (value - plain).abs()
        print(
            f"λ^s of {name}: differs by {float(apart.max()):.1e} at most, "
            f"{float(apart.mean()):.1e} in the mean; it moved by {moved:.1e}"
        )


if __name__ == "__main__":
    main()
