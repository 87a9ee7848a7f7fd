"""Differential privacy of φ with nobody to trust: the clients' noise inside secure sums.

Every client clips its change to the norm C and adds discrete Gaussian noise of z·C/√n before it
masks it: the server learns the sum with noise of z·C, n being the number of clients asked (the
distributed discrete Gaussian mechanism, Kairouz, Liu and Steinke, ICML 2021).

Of n' ≤ n clients in a sum the noise is smaller by √(n'/n), and is accounted for as that. ρ of
zero-concentrated DP adds up over a client's rounds; ε is that of the client with the largest ρ,
from dp-accounting. What a sum spends is written down before it is unmasked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor

from fedp2eft.client.phase import Phase
from fedp2eft.errors import UserError
from fedp2eft.federation.server.exchange import Member
from fedp2eft.federation.server.privacy import ASKED, Private
from fedp2eft.federation.wire.keys import FEWEST
from fedp2eft.federation.wire.sums import Noise
from fedp2eft.files import read_json, write_json
from fedp2eft.runtime.client_rows import LABEL_PRIOR_FILE
from fedp2eft.settings.experiment import Settings

SPENT = "privacy/rho/"


class Distributed(Private):
    """Averages noised sums, and keeps account of what every client spent in them.

    Arguments and errors are those of `Private`.
    """

    def __init__(
        self, settings: Settings, phase: Phase, members: Sequence[Member], folder: Path
    ) -> None:
        self._rho: dict[str, float] = {}
        super().__init__(settings, phase, members, folder)

    def _noise(self, asked: int) -> Noise:
        s = self.settings
        return Noise(s.clip_norm, s.noise_multiplier, asked, s.secure_bits)

    def spent(self, round_: int) -> str | None:
        """Return why there cannot be this round: with few clients it could pass the budget."""
        s = self.settings
        if s.epsilon is None:
            return None
        fewest = max(FEWEST, math.ceil(self._peers.min_share * self.size))
        more = self._noise(self.size).rho(fewest, self.entries)
        could = dict(self._rho)
        for member in self.sample(round_):
            could[member.client] = could.get(member.client, 0.0) + more
        if self.epsilon(could, 0) <= s.epsilon:
            return None
        return (
            f": ε is {self.epsilon(self._rho, 0):.3g} (δ {s.delta:g}), and one round more with "
            f"{fewest} clients left would pass the budget privacy.epsilon = {s.epsilon:g}."
        )

    @property
    def _written_first(self) -> bool:
        return False  # a client's noised change is masked: nothing is learned of it before the sum

    def before_unmasking(self, names: Sequence[str]) -> None:
        """Count a sum of these clients as spent: it may be learned from now on."""
        rho = self._noise(len(self._asked)).rho(len(names), self.entries)
        for name in names:
            self._rho[name] = self._rho.get(name, 0.0) + rho
        if self.settings.test_seed is None:  # a repeated round then has the same noise
            write_json(self._folder / ASKED, dict(sorted(self._rho.items())))

    def of_sum(
        self, round_: int, sent: Mapping[str, Tensor], sums: Mapping[str, Any], weight: int
    ) -> tuple[ArrayRecord | None, dict[str, Any]]:
        """Return φ moved by the noised sum over the clients sampled, whoever dropped out."""
        s = self.settings
        arrays = ArrayRecord(
            {
                name: Array((value.double().numpy() + sums[name] / self.size).astype(np.float32))
                for name, value in sent.items()
            }
        )
        spent = self.epsilon(self._rho, 0)
        return arrays, {"epsilon": spent, "delta": s.delta, "clip-norm": s.clip_norm}

    def epsilon(self, taken: Mapping[str, float], _rounds: int) -> float:
        """Return ε of the client that spent most, with its answer to the label prior's query."""
        try:
            from dp_accounting import ZCDpEvent
            from dp_accounting.rdp import RdpAccountant
        except ImportError as error:
            raise UserError(
                'privacy needs dp-accounting: pip install "fedp2eft[privacy]".'
            ) from error
        known = read_json(self._folder / LABEL_PRIOR_FILE) or {}
        rho = max(taken.values(), default=0.0) + float(known.get("rho", 0.0))
        if not rho:
            return 0.0
        return float(RdpAccountant().compose(ZCDpEvent(rho)).get_epsilon(self.settings.delta))

    def memory(self) -> dict[str, Tensor]:
        """Return what must be known to resume after this round, by name."""
        spent = sorted(self._rho.items())
        return {SPENT + name: torch.tensor(rho, dtype=torch.float64) for name, rho in spent}

    def remember(self, kept: Mapping[str, Tensor]) -> None:
        """Resume from there, or from what was written since."""
        self._rho = {
            n.removeprefix(SPENT): float(v) for n, v in kept.items() if n.startswith(SPENT)
        }
        if self.settings.test_seed is None:
            for name, rho in (read_json(self._folder / ASKED) or {}).items():
                self._rho[name] = max(self._rho.get(name, 0.0), float(rho))
