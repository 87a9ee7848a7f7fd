"""Seconds until `fedp2eft --help` is printed, and what it imports.

python benchmarks/startup.py [--runs 7]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

from common import machine, spread

COMMAND = [sys.executable, "-c", "from fedp2eft.cli import main; main(['--help'])"]
HEAVY = ("torch", "transformers", "peft", "flwr", "datasets", "numpy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=7)
    options = parser.parse_args()
    seconds = []
    for _ in range(options.runs):  # of the clock: it is another process that works
        start = time.perf_counter()
        subprocess.run(COMMAND, check=True, capture_output=True)
        seconds.append(time.perf_counter() - start)
    imported = f"import sys; print(*(set({HEAVY!r}) & set(sys.modules)))"
    code = f"from fedp2eft.cli import main; main(['--help']); {imported}"
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    print(machine())
    print(f"fedp2eft --help: {spread(seconds)}")
    print(f"heavy packages imported: {seen.stdout.splitlines()[-1] or 'none'}")


if __name__ == "__main__":
    main()
