"""Coverage-guided fuzzing of everything that is parsed: 109,000 cases, two minutes of a core.

    pip install atheris
    OMP_NUM_THREADS=1 python benchmarks/fuzz.py --cases 7200 --out runs/fuzz

Every target of tests/fuzz/targets.py runs in a process of its own, forked from one that has
imported everything. Only a one-line `UserError` may come out of one; anything else ends its run,
and the input is kept as OUT/<target>/crash-*. Corpora stay in OUT, so a second start resumes from
the first one's coverage. Prints a table and writes it to OUT/counts.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from pathlib import Path

import atheris

ROOT = Path(__file__).resolve().parents[1]
SLOW_SHARE = 14  # a YAML of settings takes that much longer than anything else

sys.path.insert(0, str(ROOT / "tests" / "fuzz"))
with atheris.instrument_imports(include=["fedp2eft"]):
    import targets


def fuzz(name: str, cases: int, folder: Path, seconds: int) -> dict[str, object]:
    """Run one target in a process of its own."""
    home = folder / name
    corpus = home / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    options = [
        f"-runs={cases}", f"-max_total_time={seconds}", "-max_len=6000", "-timeout=60",
        "-rss_limit_mb=6000", f"-artifact_prefix={home}/", str(corpus),
    ]  # fmt: skip
    start = time.perf_counter()
    child = os.fork()
    if not child:
        run_target(name, options, home / "log.txt")
    _, status, used = os.wait4(child, 0)
    log = (home / "log.txt").read_text(encoding="utf-8", errors="replace")
    runs = [int(n) for n in re.findall(r"^(?:Done |#)(\d+)\b", log, flags=re.MULTILINE)]
    coverage = re.findall(r"\bcov: (\d+)", log)
    return {
        "target": name,
        "cases": max(runs, default=0),
        "branches": int(coverage[-1]) if coverage else 0,
        "inputs-kept": len(list(corpus.iterdir())),
        "crashes": sum(len(list(home.glob(f"{kind}-*"))) for kind in ("crash", "timeout", "oom")),
        "ended": status == 0,
        "seconds": round(time.perf_counter() - start, 1),
        "processor-seconds": round(used.ru_utime + used.ru_stime, 1),
    }


def run_target(name: str, options: list[str], log: Path) -> None:
    """The process of one target: libFuzzer takes over and ends it."""
    try:
        with log.open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        for i, seed in enumerate(targets.seeds(name)):
            (Path(options[-1]) / f"seed-{i}").write_bytes(seed)
        atheris.Setup([sys.argv[0], *options], lambda data: targets.check(name, data))
        atheris.Fuzz()
    finally:
        os._exit(1)  # libFuzzer ends the process itself where all is well


def main() -> None:
    """Fuzz all targets, or those named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=7200, help="per target")
    parser.add_argument("--seconds", type=int, default=1800, help="most for one target")
    parser.add_argument("--out", type=Path, default=Path("runs/fuzz"))
    parser.add_argument("--only", nargs="*", default=[])
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    total = 0
    for name in options.only or targets.TARGETS:
        cases = options.cases // (SLOW_SHARE if name in targets.SLOW else 1)
        row = fuzz(name, cases, options.out.resolve(), options.seconds)
        with (options.out / "counts.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        total += int(str(row["cases"]))
        print(json.dumps(row), flush=True)
    print(f"{total} cases", flush=True)


if __name__ == "__main__":
    main()
