"""Accuracy of unseen clients against ε: the quickstart's data, several noise levels and seeds.

    OMP_NUM_THREADS=2 python benchmarks/privacy_curve.py [--seeds 42 52 62] [--levels 0.01 0.1 1 4]

The first cell of a seed is the quickstart (one rank budget, unseen clients) without privacy; it
trains the base, scores what φ has no part in, and its median change of φ is the clip norm of the
others. Every other cell trains φ anew under its noise (docs/privacy.md) on that base and scores
FedP²EFT alone. Round 1 starts from the same φ everywhere, so its clients are computed once.
Beside accuracy: how far λ̂ of the unseen clients is from that without noise, and which share of
their kept ranks stays, in the same measure for the PSG of round 0 ("untrained").

One line per cell goes to benchmarks/results/privacy_curve.jsonl; lines that are there are not
computed again. The first cell takes about as long as the quickstart, the others half of
it. Cheaper: a base that is there (`--base RUN/base`), and settings, which further arguments are
(`--data.max_train=24 --federation.rounds=2`).
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedp2eft.adapters.budget import keep_largest
from fedp2eft.client.training import train_round
from fedp2eft.experiment.train import train
from fedp2eft.federation.server.run_folder import RunFolder
from fedp2eft.generator import PSG
from fedp2eft.runtime import phases
from fedp2eft.runtime.workspace import Workspace
from fedp2eft.settings.experiment import Settings
from fedp2eft.settings.reading import read_yaml, settings_from

RESULTS = Path(__file__).parent / "results" / "privacy_curve.jsonl"
LEVELS = (0.01, 0.1, 1.0, 4.0)  # noise multipliers
RANK = 2
WITHOUT_PHI = ["base", "lora"]


def cell_settings(preset: dict[str, Any], seed: int, level: float, norm: float | None,
                  options: list[str]) -> Settings:  # fmt: skip
    """The quickstart with one noise level; 0 is without privacy."""
    raw = json.loads(json.dumps(preset))
    raw["seed"] = seed
    methods = ["fedp2eft"] if level else [*WITHOUT_PHI, "fedp2eft"]
    raw["evaluation"] |= {
        "methods": methods, "ranks": [RANK], "pools": ["unseen"], "save_adapters": False,
    }  # fmt: skip
    if level:
        raw["privacy"] = {"clipping": "fixed", "clip_norm": norm, "noise_multiplier": level,
                          "test_seed": seed}  # fmt: skip
    return settings_from(raw, options)


def measure(settings: Settings, folder: Path, base: Path | None) -> dict[str, Any]:
    """One run; its scores and what it spent. Its base is `base`, or else its own."""
    if base and not (folder / "base").exists():
        RunFolder(folder, settings).close()
        shutil.copytree(base, folder / "base")
    results = train(settings, folder)
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    rounds = [line for line in map(json.loads, text.splitlines()) if line["phase"] == "psg"]
    norms = [line["norm"] for line in rounds if "norm" in line]
    return {
        "epsilon": rounds[-1].get("epsilon"),
        "delta": rounds[-1].get("delta"),
        "rounds": len(rounds),
        "clients-per-round": settings.federation.clients_per_round,
        "clip-norm": settings.privacy.clip_norm if settings.privacy.on else None,
        "norm": statistics.median(norms) if norms else None,
        "accuracy": {row.method: round(row.mean, 4) for row in results.rows},
        "rows": settings.data.max_train,
    }


class Moved:
    """How far λ̂ of the unseen clients is from what a run without noise predicts.

    Args:
        settings: That run's.
        plain: Its folder.
    """

    def __init__(self, settings: Settings, plain: Path) -> None:
        workspace = Workspace(settings, plain)
        unseen = [client.name for client in workspace.data.pool("unseen")]
        self._xi = [workspace.features(name) for name in unseen]
        self._plain = self._lambdas(PSG.from_pretrained(plain / "psg"))
        self.untrained = self._apart(self._lambdas(PSG(workspace.psg_config)))

    def __call__(self, folder: Path) -> dict[str, float]:
        """Of the PSG in a run folder: mean |λ̂ − λ̂ without noise| / λ̂, share of ranks that stay."""
        return self._apart(self._lambdas(PSG.from_pretrained(folder / "psg")))

    @torch.no_grad()
    def _lambdas(self, psg: PSG) -> list[Tensor]:
        return [psg(xi) for xi in self._xi]

    def _apart(self, lambdas: list[Tensor]) -> dict[str, float]:
        pairs = list(zip(lambdas, self._plain, strict=True))
        moved = [float((a - b).abs().mean() / b.mean()) for a, b in pairs]
        kept = [(keep_largest(a, RANK), keep_largest(b, RANK)) for a, b in pairs]
        stay = [float((mine & plain).sum() / plain.sum()) for mine, plain in kept]
        return {
            "lambda": round(statistics.mean(float(a.mean()) for a in lambdas), 5),
            "lambda-moved": round(statistics.mean(moved), 5),
            "ranks-that-stay": round(statistics.mean(stay), 4),
        }


def compute_once() -> None:
    """A client's round that starts from the same φ and seed is not computed a second time."""
    known: dict[tuple[str, int], Any] = {}
    compute = train_round

    def once(*parts: Any, seed: int, **others: Any) -> Any:
        psg = next(part for part in parts if isinstance(part, PSG))
        phi = b"".join(value.numpy().tobytes() for _, value in sorted(psg.phi().items()))
        key = (sha256(phi).hexdigest(), seed)
        if key not in known:
            known[key] = compute(*parts, seed=seed, **others)
        return known[key]

    phases.train_round = once  # type: ignore[assignment, attr-defined]


def main() -> None:
    """Compute what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 52, 62])
    parser.add_argument("--levels", type=float, nargs="+", default=list(LEVELS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--runs", type=Path, default=Path("runs/privacy-curve"))
    parser.add_argument("--config", default=str(files("fedp2eft") / "presets" / "quickstart.yaml"))
    parser.add_argument("--base", type=Path, help="of the one seed, trained before")
    asked, options = parser.parse_known_args()
    preset = read_yaml(asked.config)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    lines = asked.out.read_text(encoding="utf-8").splitlines() if asked.out.exists() else []
    cells = {(c["seed"], c["noise"]): c for c in map(json.loads, lines)}
    compute_once()
    for seed in asked.seeds:
        plain, moved = asked.runs / f"s{seed}-z0", None
        for level in (0.0, *asked.levels):
            if (seed, level) not in cells:
                norm = cells[(seed, 0.0)]["norm"] if level else None
                settings = cell_settings(preset, seed, level, norm, options)
                folder = asked.runs / f"s{seed}-z{level:g}"
                found = measure(settings, folder, plain / "base" if level else asked.base)
                if moved is None:
                    without = cell_settings(preset, seed, 0.0, None, options)
                    moved = Moved(without, plain.resolve())
                cell = {"seed": seed, "noise": level, **found, **moved(folder)}
                cells[(seed, level)] = cell if level else {**cell, "untrained": moved.untrained}
                with asked.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(cells[(seed, level)]) + "\n")
            print(json.dumps(cells[(seed, level)]), flush=True)


if __name__ == "__main__":
    main()
