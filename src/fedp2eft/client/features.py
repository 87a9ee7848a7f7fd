"""Client features ξ: what a client's text looks like inside the frozen model (paper section 4).

For each linear layer, in module order, the mean and √(variance + 1e-5) of its input over the
client's training rows, adapters off; the variance is unbiased and runs over all batches. The base
is frozen, so ξ of a client never changes.

A causal LM's output head is a linear layer like any other here, tied to the embeddings or not: ξ
describes its input, not its weights. (It is not adapted unless asked.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fedp2eft.modes import in_mode

EPSILON = 1e-5


class _Moments:
    """Count, mean and sum of squared deviations of a stream of values, in float64."""

    def __init__(self, count: int = 0, mean: float = 0.0, deviation: float = 0.0) -> None:
        self.count, self.mean, self.deviation = count, mean, deviation

    @classmethod
    def of(cls, values: Tensor) -> _Moments:
        # Two passes of vectorised sums; torch.var_mean takes over ten times as long on a CPU.
        # Norms of single vectors keep the sum of squares exact, and need no tensor of squares.
        wide = values.float()
        mean = wide.mean()
        apart = wide.sub_(mean) if wide is not values else wide - mean
        norms = torch.linalg.vector_norm(apart, dim=-1)
        return cls(values.numel(), float(mean), float(norms.double().square_().sum()))

    def merge(self, part: _Moments) -> None:
        """Become the moments of both streams together (Chan's pairwise update)."""
        total = self.count + part.count
        shift = part.mean - self.mean
        self.mean += shift * part.count / total
        self.deviation += part.deviation + shift * shift * self.count * part.count / total
        self.count = total

    def pair(self) -> tuple[float, float]:
        variance = self.deviation / max(1, self.count - 1)
        return self.mean, math.sqrt(variance + EPSILON)


class _Recorder:
    """Takes the moments of every linear layer's input while it is open.

    Attributes:
        mask: Real positions of the present batch (rows × length), or None to count all.
        places: Indices of the real positions where there is padding, else None.
    """

    def __init__(
        self, linears: Sequence[tuple[str, nn.Module]], head: nn.Module | None = None
    ) -> None:
        self.mask: Tensor | None = None
        self.places: Tensor | None = None
        self.moments = [_Moments() for _ in linears]
        self._linears = linears
        self._head = head
        # Query, key and value read one tensor: its moments are computed once.
        self._last: tuple[Tensor, _Moments] | None = None

    def expect(self, mask: Tensor | None) -> None:
        """Say which positions of the next batch are real; None counts all."""
        self.mask = mask
        padded = mask is not None and not bool(mask.all())
        self.places = mask.flatten().nonzero().squeeze(1) if mask is not None and padded else None

    def _record(self, row: int, x: Tensor) -> None:
        if not x.numel():  # an expert that no token was sent to
            return
        if self._last is None or self._last[0] is not x:
            self._last = (x, _Moments.of(self._real(x)))
        self.moments[row].merge(self._last[1])

    def _real(self, x: Tensor) -> Tensor:
        """Return the vectors of a layer's input that are no padding."""
        if self.places is None or self.mask is None or x.shape[:-1] != self.mask.shape:
            return x
        # Whole vectors by their indices: a tenth of the time that a mask takes.
        return x.flatten(0, -2).index_select(0, self.places)

    @contextmanager
    def recording(self) -> Iterator[None]:
        def hook_for(row: int) -> Callable[[nn.Module, tuple[Tensor, ...]], Tensor | None]:
            def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor | None:
                self._record(row, inputs[0])
                # Nobody reads the logits, and those of all positions would be most of the work.
                return inputs[0][:, -1:] if module is self._head else None

            return hook

        handles = [
            module.register_forward_pre_hook(hook_for(row))
            for row, (_, module) in enumerate(self._linears)
        ]
        try:
            yield
        finally:
            self._last = None
            for handle in handles:
                handle.remove()


def client_features(
    model: nn.Module,
    linears: Sequence[tuple[str, nn.Module]],
    batches: Iterable[dict[str, Tensor]],
    *,
    masked: bool = True,
) -> Tensor:
    """Return ξ of one client, 2M values: mean and deviation of layer 0, of layer 1, and so on.

    Args:
        model: The frozen base, adapters off.
        linears: (name, module) of the M linear layers, in module order.
        batches: The client's training rows as model inputs.
        masked: Leave padding positions out (layers that see one vector per row have none).

    Returns:
        Float32 tensor of 2M values on the CPU.
    """
    # A classifier has no head over the vocabulary.
    recorder = _Recorder(linears, getattr(model, "get_output_embeddings", lambda: None)())
    with in_mode(model, training=False), torch.inference_mode(), recorder.recording():
        for batch in batches:
            inputs = {key: value for key, value in batch.items() if key != "labels"}
            recorder.expect(inputs["attention_mask"].bool() if masked else None)
            model(**inputs)
    pairs = [value for moments in recorder.moments for value in moments.pair()]
    return torch.tensor(pairs, dtype=torch.float32)
