"""Chooses the quickstart's preset on held-out train rows of seen clients. About 20 minutes.

    python benchmarks/quickstart_preset.py OUT

Every candidate is a normal run with `data.holdout`, so no test row and no unseen client is looked
at. One line per candidate goes to OUT/candidates.jsonl; done ones are not computed again.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

from fedp2eft.experiment.train import train
from fedp2eft.settings.reading import read_yaml, settings_from

HOLDOUT: dict[str, Any] = {"data": {"holdout": 0.25}, "evaluation": {"pools": ["seen"]}}
BASES: dict[str, dict[str, Any]] = {
    f"lr {lr:g}, {rounds} rounds": {"base": {"lr": lr, "rounds": rounds}}
    for lr in (2e-4, 5e-4, 1e-3)
    for rounds in (4, 6)
}
CANDIDATES: dict[str, dict[str, Any]] = {
    f"λ0 {lam:g}, lr {lr:g}, λ lr {lambda_lr:g}, psg lr {psg_lr:g}": {
        "generator": {"init_lambda": lam, "lr": psg_lr},
        "local": {"lr": lr, "personalize_lr": lr, "lambda_lr": lambda_lr},
    }
    for lam in (0.5, 1.0, 2.0)
    for lr in (1e-3, 3e-3)
    for lambda_lr, psg_lr in ((1e-1, 1e-3),)
}


def merged(*parts: dict[str, Any]) -> dict[str, Any]:
    whole: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            inner = isinstance(value, dict) and isinstance(whole.get(key), dict)
            whole[key] = merged(whole[key], value) if inner else value
    return whole


def main(out: Path) -> None:
    preset = read_yaml(str(files("fedp2eft") / "presets" / "quickstart.yaml"))
    log = out / "candidates.jsonl"
    out.mkdir(parents=True, exist_ok=True)
    done = (
        {json.loads(line)["name"] for line in log.read_text().splitlines()} if log.exists() else ()
    )

    def measure(name: str, raw: dict[str, Any], base: Path | None = None) -> Path:
        folder = out / name.replace(" ", "_").replace(",", "")
        if name not in done:
            if base and not (folder / "base").exists():
                folder.mkdir(parents=True, exist_ok=True)
                settings = settings_from(raw)
                _make_run(folder, settings)
                shutil.copytree(base / "base", folder / "base")
            start = time.perf_counter()
            results = train(settings_from(raw), folder)
            scores = {f"{row.method}-r{row.rank}": round(row.mean, 4) for row in results.rows}
            seconds = round(time.perf_counter() - start)
            with log.open("a") as file:
                file.write(
                    json.dumps({"name": name, **scores, "seconds": seconds}, ensure_ascii=False)
                    + "\n"
                )
        return folder

    only_base = {"evaluation": {"methods": ["base"]}, "federation": {"rounds": 0}}
    for name, change in BASES.items():
        measure(f"base {name}", merged(preset, HOLDOUT, only_base, change))
    chosen = f"base lr {float(preset['base']['lr']):g}, {preset['base']['rounds']} rounds"
    base = out / chosen.replace(" ", "_").replace(",", "")
    for name, change in CANDIDATES.items():
        measure(name, merged(preset, HOLDOUT, change), base)


def _make_run(folder: Path, settings: Any) -> None:
    from fedp2eft.federation.server.run_folder import RunFolder

    RunFolder(folder, settings).close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
