"""What the numbers of φ travel in, and what that does to accuracy, over the quickstart's rounds.

    python benchmarks/wire.py OUT [--seeds 42] [--wires fp32 bf16 int8] [--languages 6]

The base is trained once a seed; each wire then starts from it. One JSON line a run goes to
OUT/wire.jsonl; runs that are there are not computed again. About 3 minutes a run on two cores with
six languages: the quickstart's three and three more of the same data.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from common import machine, quickstart

from fedp2eft.experiment.train import train
from fedp2eft.settings.reading import settings_from


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--wires", nargs="+", default=["fp32", "bf16", "int8"])
    parser.add_argument("--languages", type=int, default=6, help="the first so many")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    log = options.out / "wire.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    done = {(line["seed"], line["wire"]) for line in map(json.loads, lines)}
    for seed in options.seeds:
        preset = quickstart(options.languages) | {"seed": seed}
        base = options.out / f"base-{seed}"
        only_base = preset | {
            "federation": preset["federation"] | {"rounds": 0},
            "evaluation": {"methods": ["base"]},
        }
        train(settings_from(only_base), base)
        for wire in options.wires:
            if (seed, wire) in done:
                continue
            run = options.out / f"{wire}-{seed}"
            raw = preset | {
                "model": preset["model"] | {"name": str(base / "base")},
                "base": {"kind": "none"},
                "federation": preset["federation"] | {"wire": wire},
                "evaluation": preset["evaluation"] | {"methods": ["fedp2eft"]},
            }
            results = train(settings_from(raw), run)
            rounds = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            psg = [line for line in rounds if line["phase"] == "psg"]
            found = {
                "seed": seed,
                "wire": wire,
                "languages": options.languages,
                "machine": machine(),
                "means": {f"{row.pool} r={row.rank}": round(row.mean, 4) for row in results.rows},
                "psg_loss": [round(line["psg-loss"], 4) for line in psg],
                "bytes_up": [line["bytes-up"] for line in psg],
                "bytes_down": [line["bytes-down"] for line in psg],
            }
            with log.open("a") as file:
                file.write(json.dumps(found) + "\n")
            print(json.dumps(found))


if __name__ == "__main__":
    main()
