"""Bayesian sparse-rank LoRA, "BT-LoRA" (paper section 3), on any Hugging Face model.

The local objective over (A, B, λ), with N training examples:

    L = α_task · task_loss
      + (α_s / N) · Σ_{l,i} ‖B_l[:,i] − B0_l[:,i]‖₁ / λ_{l,i}         significance
      + (α_p / N) · Σ_{l,i} (100·λ_{l,i} + log λ_{l,i})                 sparsity

The first penalty is a Laplace(0, λ) prior on B, the second λ's Gamma hyper-prior with shape 0.01
and rate 100 (BayesTune, NeurIPS 2023).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedp2eft.adapters.budget import keep_largest
from fedp2eft.adapters.gates import (
    AdaptedLayer,
    adapted_layers,
    add_adapter,
    clamp_straight_through,
)
from fedp2eft.adapters.low_rank import fuse
from fedp2eft.adapters.weights import AdapterWeights, LayerWeights
from fedp2eft.errors import UserError
from fedp2eft.seeding import derive_seed
from fedp2eft.settings.experiment import AdapterSettings

FULL = "sparse-rank"
GAMMA_RATE = 100.0


@dataclass(frozen=True)
class PriorLoss:
    """The penalties of L, for one client or per client.

    Args:
        total: What the task's loss is added to.
        ranks: Significance and sparsity of every rank, (clients ×) L × r_max each; detached.
        alphas: Their weights.
        examples: N, a number or one per client.
    """

    total: Tensor
    ranks: tuple[Tensor, Tensor]
    alphas: tuple[float, float]
    examples: int | Tensor

    def terms(self) -> tuple[Tensor, Tensor]:
        """Return significance and sparsity, weighted as in L; they sum to `total` (rounded)."""
        significance, sparsity = (
            alpha * value.sum(dim=(-2, -1)) / self.examples
            for alpha, value in zip(self.alphas, self.ranks, strict=True)
        )
        return significance, sparsity


class BTLora:
    """A frozen base model with r_max gated ranks on every adapted layer.

    The base is wrapped once and shared by all clients of a process: `reset` starts a client anew,
    `trimmed` lends a smaller adapter for personalization and takes it away afterwards.

    Args:
        base: A Hugging Face model; its weights are frozen from here on.
        settings: Shape, prior range and seed of the adapter.
        clamp_forward: Whether the forward pass sees λ clamped (profile `paper`) or raw.

    Attributes:
        model: The PEFT model; call it in place of the base.
        names: The L adapted modules, in module order.
        linears: The M linear layers of the base, in module order, for the features ξ.
        lam: λ, a parameter of shape L × r_max (L × 1 where λ is layer-wise), which training may
            take out of its range.
    """

    def __init__(
        self,
        base: nn.Module,
        settings: AdapterSettings | None = None,
        *,
        clamp_forward: bool = True,
    ) -> None:
        self.settings = settings or AdapterSettings()
        s = self.settings
        self._limits = (s.lambda_min, s.lambda_max)
        self.linears = tuple(
            (name, module)
            for name, module in base.named_modules()
            if isinstance(module, nn.Linear | Conv1D)
        )
        config = LoraConfig(
            r=s.r_max, lora_alpha=s.scaling * s.r_max, target_modules=s.target_modules
        )
        refusal = f"The model cannot be adapted at {s.target_modules!r} (adapter.target_modules)"
        self.model = add_adapter(base, config, FULL, refusal)  # reset() gives it first weights
        self.layers = tuple(adapted_layers(self.model, FULL))
        self.names = tuple(layer.name for layer in self.layers)
        self.lam = nn.Parameter(torch.empty(len(self.layers), 1 if s.layerwise else s.r_max))
        self.lam.data = self.lam.data.to(self.layers[0].A.device)
        clamp = self._limits if clamp_forward else None
        for row, layer in enumerate(self.layers):
            layer.gate(self.lam, row, clamp)
            fuse(layer.module)
        self.model.train(base.training)  # the gates, too
        self._common_A = [common_A(layer.name, layer.A, s.seed) for layer in self.layers]
        self._B0: list[Tensor] | None = None
        self.reset()

    @property
    def A(self) -> list[nn.Parameter]:
        """A of every layer before its gate, each r_max × d_in."""
        return [layer.A for layer in self.layers]

    @property
    def B(self) -> list[nn.Parameter]:
        """B of every layer, each d_out × r_max."""
        return [layer.B for layer in self.layers]

    @property
    def costs(self) -> list[int]:
        """Parameters of one rank of every layer: d_in + d_out."""
        return [layer.A.shape[1] + layer.B.shape[0] for layer in self.layers]

    @property
    def weights(self) -> list[nn.Parameter]:
        """Every A, then every B."""
        return self.A + self.B

    def set_common_A(self, weights: dict[str, Tensor]) -> None:
        """Use the given A (module name → r_max × d_in) instead of the seeded one, and reset."""
        missing = [name for name in self.names if name not in weights]
        if missing:
            raise UserError(f"No first A for layer {missing[0]!r}: give one for every layer.")
        self._common_A = [
            weights[layer.name].detach().to(layer.A.device, layer.A.dtype).clone()
            for layer in self.layers
        ]
        self.reset()

    @torch.no_grad()
    def reset(self, lam: Tensor | float = 1e-4) -> None:
        """Reset to the common A, B = 0 and the given λ (a number, L × r_max or L × 1)."""
        for layer, A in zip(self.layers, self._common_A, strict=True):
            layer.A.copy_(A)
            layer.B.zero_()
            layer.A.grad = layer.B.grad = None
        self.set_lambda(lam)
        self._B0 = None

    @contextmanager
    def directions(self, rows: Sequence[Tensor]) -> Iterator[None]:
        """Use other rows as the common A of each layer while the block lasts.

        Args:
            rows: r_max × d_in per layer; rows of zeros stay as the common A has them.
        """
        before = self._common_A
        self._common_A = [
            torch.where(new.any(dim=1, keepdim=True), new.to(A), A)
            for new, A in zip(rows, before, strict=True)
        ]
        try:
            yield
        finally:
            self._common_A = before
            self.reset()

    @torch.no_grad()
    def set_lambda(self, lam: Tensor | float) -> None:
        """Set λ in place to a number, or to L × r_max or L × 1 values."""
        self.lam.copy_(torch.as_tensor(lam).expand_as(self.lam))
        self.lam.grad = None

    def anchor(self) -> None:
        """Use the current B as B0: the significance penalty counts changes from here."""
        self._B0 = [B.detach().clone() for B in self.B]

    def clamped(self, lam: Tensor) -> Tensor:
        """Return λ clamped to its range, gradients straight through."""
        return clamp_straight_through(lam, *self._limits)

    def penalty(self, examples: int, alpha_s: float = 100.0, alpha_p: float = 0.01) -> Tensor:
        """Return the penalties of L for N = `examples` training rows.

        A layer-wise λ stands for each of its layer's r_max ranks.

        Args:
            examples: N.
            alpha_s: Weight of the significance penalty.
            alpha_p: Weight of the sparsity penalty.
        """
        return self.prior_loss(examples, alpha_s, alpha_p).total

    def prior_loss(self, examples: int, alpha_s: float, alpha_p: float) -> PriorLoss:
        """Return `penalty` and its terms."""
        change = (
            self.B if self._B0 is None else [B - B0 for B, B0 in zip(self.B, self._B0, strict=True)]
        )
        columns = torch.stack([delta.abs().sum(dim=0) for delta in change])
        return penalties(columns, self.clamped(self.lam), examples, alpha_s, alpha_p)

    def rank_lambda(self, lam: Tensor | None = None) -> Tensor:
        """Return λ (this adapter's by default) as L × r_max values, detached and clamped."""
        lam = self.clamped((self.lam if lam is None else lam).detach())
        return lam.expand(len(self.names), self.settings.r_max)

    @contextmanager
    def trimmed(self, lam: Tensor, keep: Tensor) -> Iterator[TrimmedAdapter]:
        """Context of a fresh adapter with only the kept ranks and λ frozen; removed at the end.

        Args:
            lam: λ, L × r_max.
            keep: Which ranks to keep, boolean L × r_max.

        Yields:
            The trimmed adapter, active on `model`: common A, B = 0.

        Raises:
            UserError: No rank at all is kept.
        """
        if not bool(keep.any()):
            raise UserError("No rank is kept, so there is nothing to fine-tune: keep at least one.")
        # Other values in the layers that are there: PEFT takes a tenth of a second to add a second
        # adapter to 74 layers and to delete it.
        lent = TrimmedAdapter(self, lam, keep)
        with ExitStack() as stack:
            for row, layer in enumerate(self.layers):
                if row in lent.kept:
                    stack.enter_context(layer.lent(*lent.kept[row], lam[row][keep[row]]))
                else:
                    stack.enter_context(layer.idle())
            yield lent

    @contextmanager
    def off(self) -> Iterator[None]:
        """Context in which `model` computes as the base model: every layer skips this adapter.

        PEFT's `disable_adapter` does the same and looks through all modules for its layers.
        """
        with ExitStack() as stack:
            for layer in self.layers:
                stack.enter_context(layer.idle())
            yield

    @contextmanager
    def bare(self) -> Iterator[nn.Module]:
        """Context of the base model without this adapter, which is restored at the end.

        For adapters of another kind, which PEFT keeps out of a model that has LoRA layers. Layers
        are only swapped in their parents: no weight is copied, and what the borrower put in place
        of the adapted layers is dropped.
        """
        base = self.model.get_base_model()
        config = base.peft_config
        for layer in self.layers:
            base.set_submodule(layer.name, layer.module.get_base_layer())
        del base.peft_config  # PEFT would take the borrower's adapter for one more of these
        try:
            yield base
        finally:
            for layer in self.layers:
                base.set_submodule(layer.name, layer.module)
            base.peft_config = config

    def weights_of(self, lam: Tensor, keep: Tensor) -> AdapterWeights:
        """Return a copy of this adapter's kept ranks (boolean, L × r_max) with λ (L × r_max)."""
        layers = [
            _layer_weights(layer, layer.A[keep[row]], layer.B[:, keep[row]], lam[row][keep[row]])
            for row, layer in enumerate(self.layers)
        ]
        return AdapterWeights(tuple(layers), self.settings.scaling)

    def trim(self, rank: int) -> AdapterWeights:
        """Return the trained adapter cut to its r·L largest λ, without further training."""
        lam = self.rank_lambda()
        return self.weights_of(lam, keep_largest(lam, rank))


class TrimmedAdapter:
    """The kept ranks of one client, inside `BTLora.trimmed`.

    Attributes:
        lam: λ with zeros where a rank was dropped, L × r_max.
        kept: A (k × d_in) and B (d_out × k) of every layer that keeps ranks, by its number.
    """

    def __init__(self, owner: BTLora, lam: Tensor, keep: Tensor) -> None:
        self._owner = owner
        self.lam = torch.where(keep, lam, torch.zeros_like(lam))
        self._lam, self._keep = lam, keep
        self.kept: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
        for row, ranks in enumerate(keep.sum(dim=1).tolist()):
            if ranks:
                own = owner.layers[row]
                A, B = owner._common_A[row][keep[row]].to(own.A.dtype), own.B
                self.kept[row] = nn.Parameter(A), nn.Parameter(B.new_zeros(len(B), ranks))

    def parameters(self) -> list[nn.Parameter]:
        """Return the kept rows of A and columns of B: all that personalization trains."""
        return [weight for pair in self.kept.values() for weight in pair]

    def weights(self) -> AdapterWeights:
        """Return a copy of the current adapter, with every adapted layer (also those of rank 0)."""
        layers = []
        for row, full in enumerate(self._owner.layers):
            A, B = self.kept.get(row) or (full.A[:0], full.B[:, :0])
            lam = self._lam[row][self._keep[row]]
            layers.append(_layer_weights(full, A, B, lam))
        return AdapterWeights(tuple(layers), self._owner.settings.scaling)


def _layer_weights(layer: AdaptedLayer, A: Tensor, B: Tensor, lam: Tensor) -> LayerWeights:
    """Return CPU copies of one layer's kept ranks."""
    A, B, lam = (value.detach().cpu().clone() for value in (A, B, lam))
    return LayerWeights(layer.name, A, B, lam, layer.is_embedding)


def penalties(
    columns: Tensor, lam: Tensor, examples: int | Tensor, alpha_s: float, alpha_p: float
) -> PriorLoss:
    """Return significance plus sparsity, for one client or per client.

    Args:
        columns: ‖B_l[:,i] − B0_l[:,i]‖₁, (clients ×) L × r_max.
        lam: λ inside its range, (clients ×) L × r_max or L × 1.
        examples: N, a number or one per client.
        alpha_s: Weight of the significance penalty.
        alpha_p: Weight of the sparsity penalty.
    """
    significance = columns / lam
    sparsity = (GAMMA_RATE * lam + lam.log()).expand_as(columns)
    sums = significance.sum(dim=(-2, -1)), sparsity.sum(dim=(-2, -1))
    total = (alpha_s * sums[0] + alpha_p * sums[1]) / examples
    ranks = significance.detach(), sparsity.detach()
    return PriorLoss(total, ranks, (alpha_s, alpha_p), examples)


def common_A(name: str, like: Tensor, seed: int) -> Tensor:
    """Return the initial A of layer `name`: Kaiming-uniform (a = √5), the same for every client.

    It depends on the seed and the layer's name alone, so rank i of a layer means the same direction
    in the whole federation; without that λ could not be shared.
    """
    generator = torch.Generator().manual_seed(derive_seed("common A", seed, name))
    A = torch.empty(like.shape, dtype=torch.float32)
    nn.init.kaiming_uniform_(A, a=5**0.5, generator=generator)
    return A.to(like.device)
