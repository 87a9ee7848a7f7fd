"""The ceiling of structure on text generation: adapters of equal size, placed in many ways.

    python benchmarks/placement.py --out runs/placement --short   # about an hour of one core
    python benchmarks/placement.py --out runs/placement           # all of it
    python benchmarks/placement.py --out runs/placement --table   # what is on disk so far

One client per language and seed: its rows of the LibreOffice help sample (pool seen) in an order
that the seed draws. The first `--rows` train, the next `--held` choose (learning rates, and what is
searched for), the next `--held` are reported. Every adapter has λ = 1 and the parameters of uniform
rank r, less than one rank below; with `--budget ranks` its ranks.

    uniform           the same rank everywhere
    attention, mlp …  uniform in layers of these kinds; first, last half: in half of the blocks
    gradient          the ranks with the largest gradient at the base, client by client
    random            a flat Dirichlet draw of each layer's share of the parameters; the best draw
                      of all clients, among the `--finalists` best of the first seed's
    greedy            forward selection over groups of layers: begin with the best one, add the one
                      that lowers the loss most, stop when none does
    psg               what the PSG of `--run` chooses, client by client; on that run's base
    best              the best of all these

Each is chosen for all clients together, some per language or per client as well, learning rates
included; random draws and steps of the greedy selection are compared at uniform's rate. Intervals:
95 %, paired bootstrap over clients. Each fine-tuning is a small file under `--out`; a second start
computes what is missing. `--short` is cut to two languages, three times 8 rows, two learning rates,
three kinds of layers (of five), three finalists of the random draws (of twenty), and four groups
(of six) for greedy selection.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache, cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import machine
from torch import Tensor

from fedp2eft.adapters.budget import keep_largest
from fedp2eft.client.side import ClientSide
from fedp2eft.client.training import features, personalize
from fedp2eft.data.partition import rng_for
from fedp2eft.errors import DivergedError
from fedp2eft.files import read_json, write_json
from fedp2eft.generator import PSG
from fedp2eft.methods.gradient import gradient_norms
from fedp2eft.results.paired import Paired
from fedp2eft.runtime.workspace import Workspace
from fedp2eft.settings.data import DataSettings
from fedp2eft.settings.experiment import (
    AdapterSettings,
    BaseSettings,
    LocalSettings,
    ModelSettings,
    Settings,
)
from fedp2eft.settings.reading import settings_of_folder
from fedp2eft.tasks.task import Scores

FULL = {
    "languages": ["de", "el", "en_US", "ja", "ru", "tr"],
    "rows": 16,
    "held": 13,
    "rates": [3e-4, 1e-3, 3e-3],
    "randoms": 20,
    "finalists": 20,
    "kinds": ["attention", "mlp", "gate+up", "down", "query+value"],
    "groups": ["attention", "gate+up", "down"],
}
SHORT = {
    "languages": ["en_US", "tr"],
    "rows": 8,
    "held": 8,
    "rates": [2e-3, 5e-3],
    "randoms": 20,
    "finalists": 3,
    "kinds": ["attention", "mlp", "gate+up"],
    "groups": ["attention", "mlp"],
}
FIXED = ("rows", "held", "rank", "budget", "r_max", "epochs", "max_length", "model", "path", "run")
"""Options that all cells of a folder have in common."""
KINDS = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "query+value": ("q_proj", "v_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
    "gate+up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
HALVES = ("first", "last")
Client = tuple[int, str]
"""Seed and language."""
Cells = dict[Client, dict[str, Any]]


class Layers:
    """The adapted layers: where each stands, and what one of its ranks has and costs.

    Attributes:
        sizes: Parameters of a rank of each layer, L.
        costs: What it takes of the budget, L: its parameters, or 1 where ranks are counted.
    """

    def __init__(self, names: Sequence[str], sizes: Sequence[int], r_max: int, budget: str) -> None:
        self.sizes, self.r_max = torch.tensor(sizes), r_max
        self.costs = self.sizes if budget == "parameters" else torch.ones_like(self.sizes)
        self.kinds = [name.rpartition(".")[2] for name in names]
        blocks = [int(re.findall(r"\.(\d+)\.", name)[0]) for name in names]
        self.halves = [HALVES[2 * block > max(blocks)] for block in blocks]

    def of(self, kinds: Iterable[str] | None = None, half: str = "") -> frozenset[int]:
        """Return the numbers of the layers of some kinds in one half of the blocks, or in both."""
        wanted = set(self.kinds if kinds is None else kinds)
        found = zip(self.kinds, self.halves, strict=True)
        return frozenset(
            number
            for number, (kind, where) in enumerate(found)
            if kind in wanted and half in ("", where)
        )

    def divided(self, shares: Tensor, rank: int) -> Tensor:
        """Return kept ranks, L × r_max: a layer's share of the budget of uniform rank r.

        Ranks are given out one by one, always to the layer that is furthest below its share.
        """
        # The golden ratio spreads the last, incomplete turn over the depth of the model.
        turn = torch.arange(len(shares), dtype=torch.float64) * 0.6180339887 % 1
        ranks = torch.arange(1, self.r_max + 1, dtype=torch.float64) + turn[:, None]
        scores = -ranks * (self.costs / shares.double())[:, None]
        keep = keep_largest(scores, rank, self.costs.tolist()) & (shares > 0)[:, None]
        left = rank * int(self.costs.sum()) - int(keep.sum(dim=1) @ self.costs)
        if left >= int(self.costs.max()):
            raise SystemExit(f"{left} of the budget are left: raise --r-max above {self.r_max}.")
        return keep

    def among(self, members: frozenset[int], rank: int) -> Tensor:
        """Return the same rank in some layers and none in the others, L × r_max."""
        chosen = torch.tensor([number in members for number in range(len(self.costs))])
        return self.divided(self.costs * chosen, rank)

    def parameters(self, keep: Tensor) -> int:
        """Return the parameters of the kept ranks."""
        return int(keep.sum(dim=1) @ self.sizes)


class Bed:
    """The model, its clients, and how one of them is fine-tuned."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options

    @cached_property
    def workspace(self) -> Workspace:
        """Every client with all its rows, on the untouched base or on that of a run."""
        o = self.options
        if o.run:
            settings = settings_of_folder(Path(o.run))
        else:
            settings = Settings(
                model=ModelSettings(o.model, task="causal_lm"),
                base=BaseSettings(kind="none"),
                adapter=AdapterSettings(r_max=o.r_max),
            )
        data = DataSettings(
            "libreoffice-help",
            path=o.path,
            languages=o.languages,
            clients_per_language=1,
            max_train=o.rows + 2 * o.held,
            max_test=1,
        )
        local = LocalSettings(
            batch_size=4,
            personalize_epochs=o.epochs,
            dropout=False,
            max_length=o.max_length,
            eval_batch_size=8,
        )
        return Workspace(replace(settings, data=data, local=local), Path(o.run) if o.run else None)

    @cached_property
    def layers(self) -> Layers:
        """The adapted layers."""
        bt = self.workspace.bt
        return Layers(bt.names, bt.costs, bt.settings.r_max, self.options.budget)

    @cached_property
    def psg(self) -> PSG:
        """The PSG of the run."""
        psg = PSG.from_pretrained(str(Path(self.options.run) / "psg"))
        psg.config.check_fits(self.workspace.psg_config)
        return psg

    @cache  # noqa: B019 - one object per process
    def side(self, client: Client) -> tuple[ClientSide, list[Any]]:
        """Return a client on its training rows, and its two sets of held-out rows."""
        o, (seed, language) = self.options, client
        [name] = [c.name for c in self.workspace.data.pool("seen") if c.language == language]
        side = self.workspace.side(name)
        order = rng_for(seed, "placement", language).permutation(len(side.train))
        ends = np.cumsum([o.rows, o.held, o.held])
        if ends[-1] > len(order):
            raise SystemExit(f"{language} has {len(order)} rows: lower --rows or --held.")
        train, *held = (side.train.select(part) for part in np.split(order, ends)[:3])
        return replace(side, train=train, seed=seed), held

    @cache  # noqa: B019
    def gradient(self, client: Client) -> Tensor:
        """Return the kept ranks by the client's gradient, L × r_max."""
        norms = gradient_norms(self.side(client)[0])
        return keep_largest(norms, self.options.rank, self.layers.costs.tolist())

    @cache  # noqa: B019
    def predicted(self, client: Client) -> Tensor:
        """Return the kept ranks by the PSG's λ̂ of the client's training rows, L × r_max."""
        side, w = self.side(client)[0], self.workspace
        xi = features(side.bt, side.task, side.train, side.settings, w.profile)
        with torch.no_grad():
            lam = self.psg(self.psg.features_of(xi, len(side.train), None))
        lam = lam.expand(-1, self.layers.r_max).contiguous()
        return keep_largest(lam, self.options.rank, self.layers.costs.tolist())

    def cell(self, client: Client, keep: Tensor | None, rate: float) -> dict[str, Any]:
        """Return what a client scores after fine-tuning the kept ranks; on the base if None."""
        (side, held), start = self.side(client), time.process_time()
        size = side.settings.eval_batch_size
        scores: list[Scores] = []

        def measure(model: Any) -> None:
            scores.extend(side.task.score(model, rows, size) for rows in held)

        if keep is None:
            keep = torch.zeros(len(self.layers.costs), self.layers.r_max, dtype=torch.bool)
            with side.bt.off():
                measure(side.bt.model)
        else:
            settings = replace(side.settings, personalize_lr=rate)
            order = side.order(settings)
            try:
                personalize(
                    side.bt, side.task, side.train, torch.ones(keep.shape), keep, order, settings,
                    seed=side.seed, measure=measure,
                )  # fmt: skip
            except DivergedError:
                return {"diverged": True}
        ranks, kinds = keep.sum(dim=1).tolist(), self.layers.kinds
        return {
            "choose": scores[0].metrics(),
            "report": scores[1].metrics(),
            "parameters": self.layers.parameters(keep),
            "ranks": sum(ranks),
            "kinds": {
                k: sum(r for r, x in zip(ranks, kinds, strict=True) if x == k) for k in kinds
            },
            "seconds": round(time.process_time() - start, 2),
        }


class Bench:
    """The cells of a folder, by (placement, learning rate)."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.bed = options, Bed(options)
        self.folder = Path(options.out)
        self.found: dict[tuple[str, float], Cells] = {}
        self.members: dict[frozenset[int], str] = {}
        self.computed = 0
        chosen = {name: getattr(options, name) for name in FIXED}
        before = read_json(self.folder / "options.json")
        if before not in (None, chosen):
            raise SystemExit(f"{self.folder} has cells of other options: {before}.")
        write_json(self.folder / "options.json", chosen)
        self.clients = list(product(options.seeds, options.languages))

    def collect(
        self,
        name: str,
        rates: Iterable[float],
        structure: Callable[[Client], Tensor | None],
        clients: Sequence[Client] | None = None,
    ) -> None:
        """Read a placement's cells (of some clients, or of all), and compute what is missing."""
        for rate, (seed, language) in product(rates, clients or self.clients):
            path = self.folder / "cells" / f"s{seed}" / language / f"{name}-{rate:g}.json"
            cell = read_json(path)
            if cell is None and not self.options.table:
                cell = self.bed.cell((seed, language), structure((seed, language)), rate)
                write_json(path, cell)
                self.computed += 1
                text = f"{cell['report']['loss']:.4f}" if "report" in cell else "diverged"
                print(
                    f"{self.computed} cells, {time.process_time():.0f} CPU s: seed {seed}, "
                    f"{language}, {name}, learning rate {rate:g}: {text}",
                    flush=True,
                )
            if cell is not None and "report" in cell:
                self.found.setdefault((name, rate), {})[seed, language] = cell

    def among(
        self,
        name: str,
        members: frozenset[int],
        rates: Iterable[float],
        clients: Sequence[Client] | None = None,
    ) -> str:
        """`collect` layers that have the same rank; returns the first name of these layers."""
        name = self.members.setdefault(members, name)
        rank = self.options.rank
        self.collect(name, rates, lambda _client: self.bed.layers.among(members, rank), clients)
        return name

    def loss(self, key: tuple[str, float], clients: Iterable[Client], part: str) -> float:
        """Mean over languages of the loss per token, pooled over seeds; infinite if incomplete."""
        cells = self.found.get(key, {})
        by_language: dict[str, list[dict[str, Any]]] = {}
        for client in clients:
            if client not in cells:
                return float("inf")
            by_language.setdefault(client[1], []).append(cells[client][part])
        return float(
            np.mean(
                [
                    sum(c["loss"] * c["tokens"] for c in those) / sum(c["tokens"] for c in those)
                    for those in by_language.values()
                ]
            )
        )

    def pick(self, names: Iterable[str], unit: str = "all") -> tuple[Cells, list[str]]:
        """Return the cells of the best (placement, learning rate), and what was chosen.

        Args:
            names: Placements to choose from.
            unit: For whom one is chosen: "all" clients, each "language", or each "client".
        """
        names = set(names)
        keys = [key for key in self.found if key[0] in names]
        if not keys:
            return {}, []
        groups: dict[Any, list[Client]] = {}
        for client in self.clients:
            whom = {"all": "", "language": client[1], "client": client}[unit]
            groups.setdefault(whom, []).append(client)
        cells: Cells = {}
        chosen = []
        for clients in groups.values():
            best = min(keys, key=lambda key: self.loss(key, clients, "choose"))
            if self.loss(best, clients, "choose") == float("inf"):
                return {}, []
            cells |= {client: self.found[best][client] for client in clients}
            chosen.append(f"{best[0]} at {best[1]:g}")
        return cells, chosen

    def greedy(self, rate: float, *languages: str) -> list[str]:
        """Return the sets of layers that forward selection passes, the last one the best."""
        clients = [c for c in self.clients if not languages or c[1] in languages]
        rest = {
            f"{half} {kind}": self.bed.layers.of(KINDS[kind], half)
            for kind, half in product(self.options.groups, HALVES)
        }
        chosen: list[str] = []
        reached, best, passed = frozenset[int](), float("inf"), list[str]()
        while rest:
            tried = {}
            for each, members in rest.items():
                name = "+".join(sorted([*chosen, each]))
                name = self.among(name, reached | members, [rate], clients)
                tried[each] = (self.loss((name, rate), clients, "choose"), name)
            each = min(tried, key=lambda each: tried[each][0])
            loss, name = tried[each]
            if loss >= best:
                break
            best, reached = loss, reached | rest.pop(each)
            chosen.append(each)
            passed.append(name)
        if passed:
            self.among(passed[-1], reached, self.options.rates, clients)
        return passed


def compute(bench: Bench) -> list[tuple[str, Cells, list[str]]]:
    """Compute what is missing; returns the rows of the table: name, cells and what was chosen."""
    o, bed = bench.options, bench.bed
    rates, layers = o.rates, bed.layers
    rows: list[tuple[str, Cells, list[str]]] = []

    def row(title: str, names: Sequence[str], unit: str = "all") -> None:
        cells, chosen = bench.pick(names, unit)
        if cells:
            rows.append((title, cells, chosen))

    # What nothing is searched for.
    bench.collect("base", [0.0], lambda _client: None)
    named = {"uniform": layers.of(), **{name: layers.of(KINDS[name]) for name in o.kinds}}
    named |= {f"{half} half": layers.of(half=half) for half in HALVES}
    for name, members in named.items():
        bench.among(name, members, rates)
    bench.collect("gradient", rates, bed.gradient)
    searched = [*named, "gradient"]
    if o.run:
        bench.collect("psg", rates, bed.predicted)
        searched.append("psg")
    for name in ["base", *searched]:
        row(name, [name])
    # What is searched for, at uniform's learning rate.
    if not any(name == "uniform" for name, *_ in rows):
        return rows
    rate = float(bench.pick(["uniform"])[1][0].rpartition(" ")[2])
    draws = [f"random {number}" for number in range(o.randoms)]
    rng = np.random.default_rng(7)
    shares = {name: torch.from_numpy(rng.exponential(size=len(layers.costs))) for name in draws}

    def divided(each: Tensor, _client: Client) -> Tensor | None:
        return layers.divided(each, o.rank)

    def by_loss(clients: Sequence[Client]) -> list[str]:
        """All draws, the best first."""
        return sorted(draws, key=lambda name: bench.loss((name, rate), clients, "choose"))

    first = [client for client in bench.clients if client[0] == o.seeds[0]]
    for name in draws:
        bench.collect(name, [rate], partial(divided, shares[name]), first)
    for name in by_loss(first)[: o.finalists]:
        bench.collect(name, [rate], partial(divided, shares[name]))
    best = by_loss(bench.clients)[0]
    bench.collect(best, rates, partial(divided, shares[best]))
    row(f"best random of {len(draws)}", draws)
    passed = bench.greedy(rate)
    row("greedy", passed)
    by_language = [bench.greedy(rate, language) for language in o.languages]
    row("greedy, per language", [name for names in by_language for name in names], "language")
    # The best of all.
    everything = [name for name, _ in bench.found if name != "base"]
    for unit in ("language", "client"):
        row(f"uniform, rate per {unit}", ["uniform"], unit)
    row("best", everything)
    for unit in ("language", "client"):
        row(f"best, per {unit}", everything, unit)
    return rows


def table(bench: Bench, rows: Sequence[tuple[str, Cells, list[str]]]) -> str:
    """Return a Markdown table of the loss on the reported rows, and its difference to uniform."""
    languages = bench.options.languages
    scored = {
        (title, 0): {
            seed: [
                {"client": language, "language": language, **cells[seed, language]["report"]}
                for language in languages
            ]
            for seed in bench.options.seeds
        }
        for title, cells, _ in rows
    }
    lines = [
        ["placement", "parameters", "ranks", *languages, "mean", "minus uniform", "chosen"],
        ["---", "--:", "--:", *["--:"] * (len(languages) + 2), "---", "---"],
    ]
    for title, cells, chosen in rows:
        unit = title.rpartition("per ")[2] if ", per" in title else ""
        reference = f"uniform, rate per {unit}" if unit else "uniform"
        by_language = [
            sum(c["loss"] * c["tokens"] for c in those) / sum(c["tokens"] for c in those)
            for name in languages
            if (those := [cells[c]["report"] for c in cells if c[1] == name])
        ]
        gain = ""
        paired = Paired.of([title, reference], scored) if title != reference else None
        if paired:
            made = paired.difference(title, reference, [0], 0)
            ends = "" if made.low is None else f" [{made.low:+.4f}, {made.high:+.4f}]"
            gain = f"{made.value:+.4f}{ends}"
        means = [
            np.mean([cell[name] for cell in cells.values()]) for name in ("parameters", "ranks")
        ]
        lines.append(
            [
                title,
                *(f"{value:,.0f}" for value in means),
                *(f"{value:.3f}" for value in [*by_language, np.mean(by_language)]),
                gain,
                "" if title == "base" else "; ".join(dict.fromkeys(chosen)),
            ]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, help="folder of the cells")
    parser.add_argument("--short", action="store_true", help="the cheapest form")
    parser.add_argument("--table", action="store_true", help="compute nothing")
    parser.add_argument("--languages", nargs="+")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 52, 62])
    parser.add_argument("--rows", type=int, help="training rows of a client")
    parser.add_argument("--held", type=int, help="rows to choose by, and as many to report")
    parser.add_argument("--rates", type=float, nargs="+", help="learning rates")
    parser.add_argument("--randoms", type=int, help="random draws")
    parser.add_argument("--finalists", type=int, help="draws that all seeds try")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), help="placements by kind")
    parser.add_argument("--groups", nargs="+", choices=list(KINDS), help="for greedy selection")
    parser.add_argument("--rank", type=int, default=2, help="r: parameters of uniform rank r")
    parser.add_argument("--budget", choices=["parameters", "ranks"], default="parameters")
    parser.add_argument("--r-max", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--max-length", type=int, default=80, help="of prompt and response")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--path", help="the whole of LibreOffice's help, in place of the sample")
    parser.add_argument("--run", help="run folder with a trained PSG")
    options = parser.parse_args()
    for name, value in (SHORT if options.short else FULL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    bench = Bench(options)
    rows = compute(bench)
    print(f"\n{machine()}\n\n{table(bench, rows)}")


if __name__ == "__main__":
    main()
