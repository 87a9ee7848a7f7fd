"""A federation on a data set of your own, from one CSV file to every client's adapter.

    python examples/own_data.py [ROWS.csv] [--model MODEL] [--run RUN]

ROWS has the columns `client`, `language`, `pool` (seen or unseen), `text` and `label`;
docs/own-data.md has the others that it may have. Without it one is written from the package
descriptions: two clients each in German and French, and two unseen ones. MODEL is any
encoder, a folder or a hub id. It takes about a minute and a half of one core.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import fedp2eft
from fedp2eft.data.debian import load_debian
from fedp2eft.settings.reading import settings_from


def example_rows(path: Path) -> Path:
    """A CSV file of six clients."""
    data = load_debian(languages=["de", "fr"], clients_per_language=2, max_train=48)
    unseen = {client.language: client for client in data.pool("unseen")}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["client", "language", "pool", "text", "label"])
        for client in (*data.pool("seen"), *unseen.values()):
            rows = data.rows(client.train)
            for text, label in zip(rows["text"], rows["label"], strict=True):
                table.writerow([client.name, client.language, client.pool, text, label])
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("rows", nargs="?", type=Path)
    parser.add_argument("--model", default="intfloat/multilingual-e5-small")
    parser.add_argument("--max-length", type=int, default=32, help="longest input in tokens")
    parser.add_argument("--run", type=Path, default=Path("runs/own-data"))
    options = parser.parse_args()
    rows = options.rows or example_rows(options.run.with_suffix(".csv"))

    # The same as a YAML file for `fedp2eft train`; what is not named has the paper's value.
    settings = settings_from(
        {
            "data": {"dataset": "files", "path": str(rows), "test_fraction": 0.25},
            "model": {"name": options.model},
            "base": {"rounds": 4, "clients_per_round": 4, "epochs": 1, "batch_size": 16,
                     "lr": 3e-4, "train_embeddings": False},
            "adapter": {"r_max": 16},
            "generator": {"init_lambda": 0.5, "lr": 1e-3},
            "local": {"batch_size": 16, "lr": 1e-3, "lambda_lr": 0.1, "personalize_lr": 1e-3,
                      "dropout": False, "max_length": options.max_length},
            "federation": {"rounds": 2, "clients_per_round": 4},
            "evaluation": {"methods": ["base", "lora", "fedp2eft"], "ranks": [4]},
        }
    )  # fmt: skip
    results = fedp2eft.train(settings, options.run)  # started again, it resumes
    for row in results.rows:
        print(f"{row.pool:7s} {row.method:9s} rank {row.rank or '–'}: {row.mean:.1%}")
    for adapter in sorted(options.run.glob("adapters/*/*/adapter_config.json")):
        print(adapter.parent)


if __name__ == "__main__":
    main()
