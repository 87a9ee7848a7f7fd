"""Accuracy of unseen clients against ε: the quickstart's data, several noise levels and seeds.

    OMP_NUM_THREADS=2 python benchmarks/privacy_curve.py [--clients 4] [--seeds 42 52 62]

Each cell is one run of the quickstart (docs/privacy.md), the base of a seed trained once and shared
by its cells. The clip norm of a seed is the median change of φ in its run without privacy, and the
PSG of "structure at random" (`fedp2eft-random`) is the level that a useless φ would have. One line
per cell goes to benchmarks/results/privacy_curve.jsonl; lines that are there are not computed
again. A cell takes about as long as the quickstart.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from importlib.resources import files
from pathlib import Path
from typing import Any

from fedp2eft.experiment.train import train
from fedp2eft.federation.run_folder import RunFolder
from fedp2eft.reading import read_yaml, settings_from
from fedp2eft.settings import Settings

RESULTS = Path(__file__).parent / "results" / "privacy_curve.jsonl"
LEVELS = (0.0, 0.001, 0.01, 0.1, 0.5, 1.0, 2.0)  # noise multipliers; 0 is without privacy
METHODS = ["base", "lora", "fedp2eft-random", "fedp2eft"]


def cell_settings(preset: dict[str, Any], clients: int, seed: int, level: float, norm: float | None,
                  options: list[str]) -> Settings:  # fmt: skip
    """The quickstart with one noise level."""
    raw = json.loads(json.dumps(preset))
    raw["seed"] = seed
    if raw["data"].get("dataset") != "files":  # a file has the clients that it has
        raw["data"]["clients_per_language"] = clients
    sampled = 6 * clients  # every seen client in every round: ε of all is then the same
    raw["federation"]["clients_per_round"] = raw["base"]["clients_per_round"] = sampled
    raw["evaluation"] |= {"methods": METHODS, "pools": ["unseen"], "save_adapters": False}
    if level:
        raw["privacy"] = {"clipping": "fixed", "clip_norm": norm, "noise_multiplier": level,
                          "test_seed": seed}  # fmt: skip
    return settings_from(raw, options)


def measure(settings: Settings, folder: Path, base: Path | None) -> dict[str, Any]:
    """One run; its scores and what it spent."""
    if base is not None and not (folder / "base").exists():
        RunFolder(folder, settings).close()
        shutil.copytree(base / "base", folder / "base")
    results = train(settings, folder)
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    rounds = [line for line in map(json.loads, text.splitlines()) if line["phase"] == "psg"]
    scores = {
        f"{row.method}-r{row.rank}": round(row.mean, 4)
        for row in results.rows
        if row.pool == "unseen"
    }
    norms = [line["norm"] for line in rounds if "norm" in line]
    return {
        "epsilon": rounds[-1].get("epsilon"),
        "delta": rounds[-1].get("delta"),
        "rounds": len(rounds),
        "norm": statistics.median(norms) if norms else None,
        **scores,
    }


def main() -> None:
    """Compute what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=1, help="clients per language and pool")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 52, 62])
    parser.add_argument("--levels", type=float, nargs="+", default=list(LEVELS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--runs", type=Path, default=Path("runs/privacy-curve"))
    parser.add_argument("--config", default=str(files("fedp2eft") / "presets" / "quickstart.yaml"))
    parser.add_argument("--option", nargs="*", default=[], help="settings, as --local.lr=1e-3")
    asked = parser.parse_args()
    preset = read_yaml(asked.config)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    lines = asked.out.read_text(encoding="utf-8").splitlines() if asked.out.exists() else []
    cells = {(c["clients"], c["seed"], c["noise"]): c for c in map(json.loads, lines)}
    for seed in asked.seeds:
        plain = asked.runs / f"c{asked.clients}-s{seed}-z0"
        for level in sorted({0.0, *asked.levels}):
            key = (asked.clients, seed, level)
            if key not in cells:
                norm = cells[(asked.clients, seed, 0.0)]["norm"] if level else None
                settings = cell_settings(preset, asked.clients, seed, level, norm, asked.option)
                folder = asked.runs / f"c{asked.clients}-s{seed}-z{level:g}"
                found = measure(settings, folder, plain if level else None)
                if level:
                    found["norm"] = norm
                cells[key] = {"clients": asked.clients, "seed": seed, "noise": level, **found}
                with asked.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(cells[key]) + "\n")
            print(json.dumps(cells[key]), flush=True)


if __name__ == "__main__":
    main()
