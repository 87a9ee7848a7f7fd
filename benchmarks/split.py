"""Stage 1 with mini-batches cut by length: what a pass through the model costs in positions.

    python benchmarks/split.py [--rows 32] [--max-length 256] [--batch-size 32] [--runs 5]

Prints the seconds of stage 1 for several values of `descent.PASS_TOKENS` in turn (0 is as many
parts as there are lengths, the largest none at all), and the positions that each computes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from common import alternate, client_rows, machine, median, spread

from fedp2eft.adapters.btlora import BTLora
from fedp2eft.client import descent
from fedp2eft.client import training as client
from fedp2eft.data.debian import LABELS
from fedp2eft.models.loading import load_base
from fedp2eft.models.precision import resolve_precision
from fedp2eft.settings.experiment import AdapterSettings, LocalSettings
from fedp2eft.settings.profiles import PAPER

WHOLE = 1_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--r-max", type=int, default=32)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--passes", type=int, nargs="+", default=[WHOLE, 512, 256, 128, 64, 0])
    options = parser.parse_args()
    task, data, source = client_rows(options.rows, options.max_length)
    dtype = resolve_precision(options.precision, "cpu")
    base = load_base(
        source, "classification", labels=LABELS, dtype=dtype, max_length=options.max_length
    )
    bt = BTLora(base, AdapterSettings(r_max=options.r_max))
    s = LocalSettings(dropout=False, epochs=1, batch_size=options.batch_size)
    order = list(descent.local_order(len(data), 1, s.batch_size, 0))
    lam: dict[str, torch.Tensor] = {}

    def mode(tokens: int) -> Callable[[], None]:
        def run() -> None:
            descent.PASS_TOKENS = tokens
            bt.reset(0.5)
            client.stage1(bt, task, data, order, s, PAPER)
            lam[str(tokens)] = bt.rank_lambda().clone()

        return run

    seconds = alternate(options.runs, **{str(tokens): mode(tokens) for tokens in options.passes})
    whole = str(options.passes[0])
    print(machine())
    about = f"{len(data)} rows of {data.lengths.mean():.0f} tokens, batches of {s.batch_size}"
    print(f"{about}, {dtype}")
    for tokens in options.passes:
        parts = [part for rows in order for part, _ in data.parts(rows, tokens)]
        positions = sum(len(part) * int(data.lengths[part].max()) for part in parts)
        values = seconds[str(tokens)]
        gain = median([a / b for a, b in zip(seconds[whole], values, strict=True)])
        apart = float((lam[str(tokens)] - lam[whole]).abs().max())
        print(
            f"{tokens:>8}: {len(parts):>3} parts, {positions:>6} positions, {spread(values)}, "
            f"{gain:.2f}× as fast; λ^s differs by {apart:.0e}"
        )


if __name__ == "__main__":
    main()
