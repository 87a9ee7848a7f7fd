"""A client's fine-tuning and scoring where only the upper blocks are adapted: states kept or not.

    python benchmarks/frozen_blocks.py [--first 8] [--rows 64] [--test-rows 24] [--max-length 32]
        [--rank 8] [--batch-size 16] [--precision auto] [--runs 5]

Both start from rows as tokens, and the model is loaded. "first" keeps nothing from before: it
computes the states of both texts too. "again" finds them, as every further method and rank does.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace

import torch
from common import alternate, client_rows, machine, median, spread, upper_blocks

from fedp2eft.adapters.btlora import BTLora
from fedp2eft.client.descent import local_order
from fedp2eft.client.training import personalize
from fedp2eft.data.debian import LABELS
from fedp2eft.models.loading import load_base
from fedp2eft.models.precision import resolve_precision
from fedp2eft.settings.experiment import AdapterSettings, LocalSettings
from fedp2eft.tasks.frozen_blocks import _KEPT
from fedp2eft.tasks.task import Scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--first", type=int, default=8, help="lowest adapted block")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--test-rows", type=int, default=24)
    parser.add_argument("--max-length", type=int, default=32)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--runs", type=int, default=5)
    o = parser.parse_args()
    task, rows, source = client_rows(o.rows + o.test_rows, o.max_length)
    train = rows.select(range(o.rows))
    test = rows.select(range(o.rows, len(rows)))
    dtype = resolve_precision(o.precision, "cpu")
    base = load_base(source, "classification", labels=LABELS, dtype=dtype, max_length=o.max_length)
    targets = upper_blocks(o.first, base)
    bt = BTLora(base, AdapterSettings(r_max=16, target_modules=targets))
    s = LocalSettings(dropout=False, batch_size=o.batch_size, personalize_lr=1e-3)
    lam = torch.ones(len(bt.names), 16)
    keep = torch.zeros_like(lam, dtype=torch.bool)
    keep[:, : o.rank] = True
    order = list(local_order(len(train), s.personalize_epochs, s.batch_size, 0))
    losses: dict[str, list[float]] = {}

    def fit(mib: int, name: str, forget: bool = False) -> Callable[[], None]:
        own = replace(task, states_mib=mib)

        def run() -> None:
            if forget:
                _KEPT.clear()
            found = personalize(bt, own, train, lam, keep, order, s)
            losses[name] = found.losses

        return run

    def score(mib: int) -> Callable[[], Scores]:
        own = replace(task, states_mib=mib)
        return lambda: own.score(bt.model, test, s.eval_batch_size)

    seconds = alternate(
        o.runs,
        whole=fit(0, "whole"), first=fit(512, "first", forget=True), again=fit(512, "again"),
        score_whole=score(0), score_first=score(512), score_again=score(512),
    )  # fmt: skip
    print(machine())
    print(
        f"{len(train)} and {len(test)} rows of {rows.lengths.mean():.0f} tokens, {dtype}, blocks "
        f"from {o.first} of {base.config.num_hidden_layers}, rank {o.rank}, {len(order)} steps"
    )
    for name, values in seconds.items():
        against = seconds["score_whole" if "score" in name else "whole"]
        ratio = median([a / b for a, b in zip(against, values, strict=True)])
        print(f"{name:>12}: {spread(values)}, {ratio:.2f} times as fast")
    apart = max(abs(a - b) for a, b in zip(losses["whole"], losses["again"], strict=True))
    print(f"losses differ by {apart:.1e} at most; first and again are the same bits: "
          f"{losses['first'] == losses['again']}")  # fmt: skip


if __name__ == "__main__":
    main()
