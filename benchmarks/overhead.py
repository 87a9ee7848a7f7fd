"""What `train` takes beside computing with the model, on the quickstart's model and clients.

    python benchmarks/overhead.py [--languages 2] [--rounds 1]

One round of the base, so many of the PSG, and every client's personalization, by the real `train`.
Counts the time inside the training loop, ξ, stage 2 and scoring (model), inside loading, saving,
hashing and tokenizing (start-up and files), and what is left: messages, aggregation, the run folder
and the wrapping of adapters. With one thread seconds are those of the processor.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import clock, machine, quickstart

from fedp2eft.client import features
from fedp2eft.client import training as client
from fedp2eft.data import registry
from fedp2eft.experiment.train import train
from fedp2eft.federation import client_app
from fedp2eft.models import loading, sources
from fedp2eft.settings.reading import settings_from
from fedp2eft.tasks.classification import Classification

MODEL = ("descend", "stage2", "client_features", "logits")
FILES = ("load_base", "load_tokenizer", "load_clients", "hash_weights", "save_model", "encode")


class Clock:
    """Seconds inside the outermost of the watched functions."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inside = False

    def watched(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if self._inside:
                return function(*args, **options)
            self._inside, start = True, clock()
            try:
                return function(*args, **options)
            finally:
                self._inside = False
                self.seconds[name] = self.seconds.get(name, 0.0) + clock() - start

        return call

    def watch(self, owner: Any, name: str) -> None:
        """Put a watch on a function wherever the package has imported it by name."""
        function = getattr(owner, name)
        watched = self.watched(name, function)
        places = [module for key, module in sys.modules.items() if key.startswith("fedp2eft")]
        for place in [owner, *places]:
            for key, value in list(vars(place).items()):
                if value is function:
                    setattr(place, key, watched)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--languages", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    assert client_app  # imported, so that the watches reach it
    watch = Clock()
    for owner, name in (
        (client, "descend"), (client, "stage2"), (features, "client_features"),
        (Classification, "logits"), (loading, "load_base"), (loading, "load_tokenizer"),
        (loading, "save_model"), (registry, "load_clients"), (sources, "hash_weights"),
        (Classification, "encode"),
    ):  # fmt: skip
        watch.watch(owner, name)
    raw = quickstart(options.languages)
    raw["base"]["rounds"] = raw["federation"]["rounds"] = options.rounds
    settings = settings_from(raw)
    with tempfile.TemporaryDirectory() as scratch:
        start = clock()
        train(settings, Path(scratch) / "run")
        total = clock() - start
    print(machine())
    for names, what in ((MODEL, "model"), (FILES, "start-up and files")):
        parts = ", ".join(f"{n} {watch.seconds.get(n, 0.0):.2f}" for n in names)
        print(f"{what}: {sum(watch.seconds.get(n, 0.0) for n in names):.2f} s ({parts})")
    rest = total - sum(watch.seconds.values())
    computing = sum(watch.seconds.get(name, 0.0) for name in MODEL)
    print(f"the rest: {rest:.2f} s, {rest / (rest + computing):.1%} of it and the model together")
    print(f"all: {total:.2f} s")


if __name__ == "__main__":
    main()
