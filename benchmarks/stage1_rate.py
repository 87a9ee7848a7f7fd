"""How close stage 1 comes to the matrix products that it is made of.

    python benchmarks/stage1_rate.py [--rows 64] [--max-length 64] [--runs 5] [--profile]

Counts the operations of forward and backward over real positions (not padding), measures how fast
the machine does matrix products of the same shapes in the same run, and prints the share that
stage 1 reaches of it.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from common import alternate, client_rows, machine, median, spread
from torch import nn
from torch.profiler import ProfilerActivity, profile

from fedp2eft.adapters.btlora import BTLora
from fedp2eft.client.descent import local_order
from fedp2eft.client.training import stage1
from fedp2eft.data.debian import LABELS
from fedp2eft.models.loading import load_base
from fedp2eft.models.precision import resolve_precision
from fedp2eft.settings.experiment import LocalSettings
from fedp2eft.settings.profiles import PAPER
from fedp2eft.tasks.encoded import Encoded


def products(bt: BTLora, data: Encoded, order: list[np.ndarray]) -> list[tuple[int, int, int, int]]:
    """(m, k, n, how often) of every matrix product of stage 1, over real positions.

    A frozen linear layer costs x·W forward and g·Wᵀ backward; A and B cost both, and their own
    gradient. The first layer's inputs need no gradient, and the last block is computed at the first
    position alone after its attention: what is left out there is left out of the count.
    """
    shapes: dict[tuple[int, int, int], int] = {}

    def add(m: int, k: int, n: int, times: int = 1) -> None:
        shapes[(m, k, n)] = shapes.get((m, k, n), 0) + times

    config = bt.model.get_base_model().config
    heads, width = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    r = bt.settings.r_max
    for rows in order:
        lengths = data.lengths[rows]
        tokens = int(lengths.sum())
        for number, (name, module) in enumerate(bt.linears):
            assert isinstance(module, nn.Linear)
            last = f"layer.{config.num_hidden_layers - 1}." in name and ".self." not in name
            # One position a row: the head, and the last block after its attention.
            pooled = module.out_features == len(LABELS) or "pooler" in name or last
            first = number < 3  # query, key and value of the first layer
            m = len(rows) if pooled else tokens
            d_in, d_out = module.in_features, module.out_features
            add(m, d_in, d_out)
            add(m, d_in, r)
            add(m, r, d_out)
            add(m, d_out, r)
            if not first:
                add(m, d_out, d_in)
                add(m, r, d_in)
            add(r, m, d_in)
            add(d_out, m, r)
        mean = int(lengths.mean())
        for _ in range(config.num_hidden_layers):
            # scores and values, forward and twice backward, per row and head
            add(mean, width, mean, 3 * heads * len(rows))
            add(mean, mean, width, 3 * heads * len(rows))
    return [(m, k, n, times) for (m, k, n), times in shapes.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    dtype = resolve_precision(options.precision, "cpu")
    task, data, source = client_rows(options.rows, options.max_length)
    base = load_base(
        source, "classification", labels=LABELS, dtype=dtype, max_length=options.max_length
    )
    bt = BTLora(base)
    s = LocalSettings(dropout=False, max_length=options.max_length)
    order = list(local_order(len(data), s.epochs, s.batch_size, 0))
    shapes = products(bt, data, order)
    operations = sum(2 * m * k * n * times for m, k, n, times in shapes)
    small = [shape for shape in shapes if shape[3] > 1000]
    large = [shape for shape in shapes if shape[3] <= 1000]
    matrices = {
        shape: (
            torch.randn(shape[0], shape[1]).to(dtype),
            torch.randn(shape[1], shape[2]).to(dtype),
        )
        for shape in large
    }
    stacks = {
        (m, k, n, t): (torch.randn(384, m, k).to(dtype), torch.randn(384, k, n).to(dtype), t // 384)
        for m, k, n, t in small
    }

    def multiply() -> None:
        for shape, (a, b) in matrices.items():
            for _ in range(shape[3]):
                a @ b
        for a, b, times in stacks.values():
            for _ in range(times):
                torch.bmm(a, b)

    def train() -> None:
        bt.reset()
        stage1(bt, task, data, order, s, PAPER)

    seconds = alternate(options.runs, stage1=train, products=multiply)
    print(machine())
    print(f"{len(data)} rows, {len(order)} steps, {operations / 1e9:.0f} GFLOP, {dtype}")
    for name, values in seconds.items():
        print(f"{name:>9}: {spread(values)}, {operations / median(values) / 1e9:.0f} GFLOP/s")
    share = median([b / a for a, b in zip(*seconds.values(), strict=True)])
    print(f"stage 1 reaches {share:.0%} of the rate of its own matrix products")
    if options.profile:
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            train()
        print(seen.key_averages().table(sort_by="self_cpu_time_total", row_limit=15))


if __name__ == "__main__":
    main()
