"""One new client, from a file to a saved adapter, beside its fine-tuning steps alone.

    python benchmarks/personalize.py [--rows 64] [--rank 8] [--tokens 0 1024] [--runs 5] [--first 8]

The model is loaded already. Everything else counts: reading and tokenizing the file, ξ, λ, choosing
ranks, building the trimmed adapter, and writing the folder. `--tokens` are values of
`generator.feature_tokens`, measured in turn (A B A B …); 0 is "all". With `--first`, only the
blocks from that one on are adapted, and ξ of all rows keeps the states that fine-tuning starts
from, or does not ("apart"). Shares are of the steps of a client that has no ξ.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import client_rows, clock, machine, median, spread, upper_blocks
from numpy.typing import NDArray

from fedp2eft.adapters.btlora import BTLora
from fedp2eft.adapters.export import save_adapter
from fedp2eft.client.descent import local_order
from fedp2eft.client.training import features, personalize, structure
from fedp2eft.data.debian import LABELS, load_debian
from fedp2eft.data.files import client_from_file
from fedp2eft.generator import PSG, PSGConfig
from fedp2eft.models.loading import load_base, load_tokenizer
from fedp2eft.models.precision import resolve_precision
from fedp2eft.settings.data import DataSettings
from fedp2eft.settings.experiment import AdapterSettings, LocalSettings
from fedp2eft.settings.profiles import PAPER
from fedp2eft.tasks.frozen_blocks import _KEPT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--tokens", type=int, nargs="+", default=[0, 1024])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="lowest adapted block")
    options = parser.parse_args()
    task, _, source = client_rows(8, options.max_length)
    task = replace(task, states_mib=512)
    tokenizer = load_tokenizer(source)
    dtype = resolve_precision("auto", "cpu")
    base = load_base(
        source, "classification", labels=LABELS, dtype=dtype, max_length=options.max_length
    )
    adapter = AdapterSettings()
    if options.first:
        adapter = AdapterSettings(target_modules=upper_blocks(options.first, base))
    bt = BTLora(base, adapter)
    psg = PSG(
        PSGConfig(
            adapter=adapter, base_model="b", base_revision="r", layer_names=bt.names,
            linear_names=tuple(name for name, _ in bt.linears),
        )
    )  # fmt: skip
    s = LocalSettings(dropout=False, max_length=options.max_length)
    federation = load_debian(
        languages=("de",), clients_per_language=1, max_train=options.rows, max_test=8
    )
    rows = federation.rows(federation.pool("unseen")[0].train)
    # What ξ is taken from, and whether it keeps states.
    modes = {f"at most {n} tokens" if n else "all rows": (n, True) for n in options.tokens}
    if options.first:
        modes = {"all rows, apart": (0, False), "all rows": (0, True)}
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in modes}
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "client.jsonl"
        file.write_text(
            "\n".join(
                json.dumps({"text": text, "label": label})
                for text, label in zip(rows["text"], rows["label"], strict=True)
            )
        )

        def one_client(tokens: int, keeps: bool, folder: Path) -> dict[str, float]:
            """Seconds of the steps alone, and of all that is beside them."""
            marks: list[float] = []
            _KEPT.clear()
            start = clock()
            client = client_from_file(file, DataSettings(labels=list(LABELS), test_fraction=0.0))
            chosen = client.clients[0].train
            data = task.encode(tokenizer, [client.rows(chosen)["text"]], client.label_ids(chosen))
            read = clock()
            of = task if keeps else replace(task, states_mib=0)
            xi = features(bt, of, data.sample(tokens, 0) if tokens else data, s, PAPER)
            heard = clock()
            lam, keep = structure(psg, xi, options.rank)

            def timed() -> Iterator[NDArray[Any]]:
                # Mini-batches are asked for between steps: first to last is the steps alone.
                for rows in local_order(len(data), s.personalize_epochs, s.batch_size, 0):
                    marks.append(clock())
                    yield rows
                marks.append(clock())

            fitted = personalize(bt, task, data, lam, keep, timed(), s)
            trained = clock()
            save_adapter(fitted.weights, folder, base="base")
            return {
                "steps": marks[-1] - marks[0],
                "file and tokens": read - start,
                "ξ": heard - read,
                "λ, ranks, building the adapter": marks[0] - heard + trained - marks[-1],
                "saving": clock() - trained,
            }

        for run in range(options.runs + 1):
            for number, (name, mode) in enumerate(modes.items()):
                took = one_client(*mode, Path(scratch) / f"adapter-{run}-{number}")
                if run:  # the first turn warms up
                    seconds[name].append(took)
    lengths = task.encode(tokenizer, [rows["text"]], [0] * len(rows["text"])).lengths
    print(machine())
    print(
        f"{options.rows} rows, {lengths.sum()} tokens, {lengths.mean():.0f} per row; "
        f"rank {options.rank}, {dtype}"
    )
    plain = [took["steps"] for took in next(iter(seconds.values()))]
    for mode_name, found in seconds.items():
        alone = plain if options.first else [took["steps"] for took in found]
        print(f"ξ from {mode_name}:")
        for name in found[0]:
            share = median([took[name] / steps for took, steps in zip(found, alone, strict=True)])
            print(f"  {name}: {spread([took[name] for took in found])}, {share:.1%} of the steps")
        totals = [sum(took.values()) for took in found]
        over = median([total / steps - 1 for total, steps in zip(totals, alone, strict=True)])
        print(f"  on top of the steps: {over:.1%}")


if __name__ == "__main__":
    main()
