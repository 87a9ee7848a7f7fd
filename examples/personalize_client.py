"""Give one client an adapter of its own, with the PSG of a finished run.

    fedp2eft quickstart                     # once: trains base and PSG
    python examples/personalize_client.py [ROWS TEST] [--run RUN] [--rank 8] [--out FOLDER]

ROWS and TEST are files (JSON lines, CSV or Parquet) with the columns `text` and `label`. Without
them the client is somebody who writes Spanish, which no client of the quickstart did. It takes
about 20 seconds of one core, a third of them for starting up.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from fedp2eft import PSG, evaluate, personalize
from fedp2eft.data.debian import load_debian


def spanish_files(folder: Path) -> list[Path]:
    """The package descriptions of one Spanish client, as files of its own: to train, to test."""
    data = load_debian(languages=["es"], clients_per_language=1, max_train=48, max_test=40)
    (client,) = data.pool("unseen")
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, numbers in (("train", client.train), ("test", client.test)):
        found = data.rows(numbers)
        files.append(folder / f"es-{name}.jsonl")
        with files[-1].open("w", encoding="utf-8") as file:
            for text, label in zip(found["text"], found["label"], strict=True):
                file.write(json.dumps({"text": text, "label": label}, ensure_ascii=False) + "\n")
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, help="ROWS TEST")
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("runs/one-client"))
    options = parser.parse_args()
    train, test = options.files or spanish_files(options.out)

    base = options.run / "base"
    psg = PSG.from_pretrained(options.run / "psg")
    adapter = personalize(psg, base, train, options.rank, test_data=test)
    folder = adapter.save(options.out / "adapter")

    kept = {module: rank for module, rank in adapter.ranks.items() if rank}
    print(f"{sum(kept.values())} ranks in {len(kept)} of {len(adapter.ranks)} layers. Most in:")
    for module in sorted(kept, key=lambda name: -kept[name])[:5]:
        print(f"  {kept[module]:3d}  {module}")
    print(f"base:    {evaluate(base, test)}")
    print(f"adapter: {adapter.scores}")
    print(f"A plain PEFT folder: {folder}")


if __name__ == "__main__":
    main()
