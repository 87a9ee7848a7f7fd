"""The adapters of several clients on one frozen base, in one batch.

A batch of C clients is C equal blocks of rows. On the rows of client c every adapted layer adds

    s · B_c · diag(λ_c) · A_c · x

to its own output: two batched products over stacked A and B (paper section 3, for many clients).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fedp2eft.adapters.btlora import BTLora, PriorLoss, penalties

Hook = Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]


class NotPerRowError(Exception):
    """A layer's input is not one block of values per row, so rows cannot be separated."""


@dataclass(frozen=True)
class _Shape:
    """Layers whose A (or B) are of one shape, kept in one tensor.

    Args:
        layers: Their indices among the L adapted layers.
        index: The same on the device.
    """

    layers: list[int]
    index: Tensor


class StackedLora:
    """Stacked A, B and λ of C clients on the base of a `BTLora`.

    Args:
        bt: The shared adapter; it is switched off while this one is `active`. Every adapted layer
            must be an nn.Linear.
        lam: First λ of every client, C × L × r_max (C × L × 1 where λ is layer-wise).
        clamp_forward: Whether the forward pass sees λ clamped (profile `paper`) or raw.

    Attributes:
        A: One tensor per width of input, C × layers × r_max × d_in.
        B: One tensor per width of output, C × layers × d_out × r_max.
        lam: λ of every client, C × L × r_max (C × L × 1).
    """

    def __init__(self, bt: BTLora, lam: Tensor, *, clamp_forward: bool = True) -> None:
        self._bt = bt
        self._clamp = clamp_forward
        bt.reset()  # the common A, B = 0
        self.lam = nn.Parameter(lam.detach().to(bt.lam.device, bt.lam.dtype).clone())
        self._in, self.A = _stacked(bt.A, len(lam))
        self._out, self.B = _stacked(bt.B, len(lam))
        self._order = torch.cat([shape.index for shape in self._out]).argsort()
        weight = bt.layers[0].module.get_base_layer().weight
        half = weight.dtype in (torch.bfloat16, torch.float16)
        self._dtype = weight.dtype if half else bt.A[0].dtype
        self._products: list[tuple[Tensor, Tensor]] = []
        self._clients = self._rows = 0

    @property
    def weights(self) -> list[nn.Parameter]:
        """Every A, then every B."""
        return [*self.A, *self.B]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Put this adapter in place of the shared one, until the end of the block."""
        handles = [
            layer.module.get_base_layer().register_forward_hook(self._hook(row))
            for row, layer in enumerate(self._bt.layers)
        ]
        try:
            with self._bt.off():
                yield
        finally:
            self._products = []
            for handle in handles:
                handle.remove()

    def load(self, clients: int, rows: int) -> None:
        """Make the next forward pass one of the first `clients` clients, `rows` rows each."""
        lam = self.lam[:clients]
        lam = (self._bt.clamped(lam) if self._clamp else lam) * self._bt.settings.scaling
        A = [
            (value[:clients] * lam.index_select(1, shape.index).unsqueeze(-1)).to(self._dtype)
            for value, shape in zip(self.A, self._in, strict=True)
        ]
        B = [value[:clients].to(self._dtype) for value in self.B]
        A, B = _by_layer(self._in, A), _by_layer(self._out, B)
        self._products = list(zip(A, B, strict=True))
        self._clients, self._rows = clients, rows

    def _hook(self, row: int) -> Hook:
        def add_low_rank(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x, (A, B) = args[0], self._products[row]
            clients = len(A)
            if x.dim() < 2 or x.shape[0] != clients * self._rows:
                raise NotPerRowError(self._bt.names[row])
            inner = torch.bmm(x.to(A.dtype).reshape(clients, -1, x.shape[-1]), A.mT)
            own = output.to(B.dtype).reshape(clients, -1, output.shape[-1])
            return torch.baddbmm(own, inner, B.mT).view(output.shape).to(output.dtype)

        return add_low_rank

    def prior_loss(self, examples: Tensor, alpha_s: float, alpha_p: float) -> PriorLoss:
        """Return the penalties of clients of N = `examples` training rows each.

        Those that had no rows in the last forward pass have a total of 0.
        """
        sums = torch.cat([value.abs().sum(dim=-2) for value in self.B], dim=1)
        columns = sums.index_select(1, self._order)
        made = penalties(columns, self._bt.clamped(self.lam), examples, alpha_s, alpha_p)
        there = torch.arange(len(made.total), device=made.total.device) < self._clients
        return replace(made, total=made.total * there)


def clip_each(weights: Sequence[nn.Parameter], bound: float) -> None:
    """Clip as `clip_grad_norm_`, per client: the first dimension of each weight."""
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    norms = torch.stack([torch.linalg.vector_norm(g.flatten(1), dim=1) for g in gradients])
    scale = (bound / (torch.linalg.vector_norm(norms, dim=0) + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(scale.view(-1, *[1] * (gradient.dim() - 1)))


def _stacked(weights: Sequence[Tensor], clients: int) -> tuple[list[_Shape], list[nn.Parameter]]:
    """Return weights of layers as one tensor per shape: clients × layers × the shape."""
    groups: dict[torch.Size, list[int]] = {}
    for row, weight in enumerate(weights):
        groups.setdefault(weight.shape, []).append(row)
    shapes = [
        _Shape(layers, torch.tensor(layers, device=weights[0].device)) for layers in groups.values()
    ]
    values = []
    for layers in groups.values():
        one = torch.stack([weights[row].detach() for row in layers])
        values.append(nn.Parameter(one.expand(clients, *one.shape).clone()))
    return shapes, values


def _by_layer(shapes: Sequence[_Shape], values: Sequence[Tensor]) -> list[Tensor]:
    """Return stacked weights as one tensor per layer, in layer order; clients stay first."""
    found: dict[int, Tensor] = {}
    for shape, value in zip(shapes, values, strict=True):
        found |= dict(zip(shape.layers, value.unbind(1), strict=True))
    return [found[row] for row in sorted(found)]
