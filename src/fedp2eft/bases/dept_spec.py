"""DEPT-SPEC (ICLR 2025): embeddings stay on the client, only the body is averaged.

A client keeps its own copy of every nn.Embedding (words, positions, types) from round to round.
Rows that its text never touches get no gradient, and AdamW without weight decay leaves them as they
were: only the rows that differ from the common ones are kept. An output layer tied to the word
embeddings is the same matrix and stays too; as a softmax touches all of its rows, a client then
keeps all. The common model has the embeddings it started with, and so has a client that never took
part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from torch import nn

from fedp2eft.adapters.weights import AdapterWeights, EmbeddingRows
from fedp2eft.bases.parts import ROWS, Part, Replacement, rows_of
from fedp2eft.bases.standard_fl import StandardFL
from fedp2eft.errors import UserError


class DeptSpec(StandardFL):
    """A client's part is the changed rows of every embedding, and their indices."""

    private = True

    def staying(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return the matrices of all nn.Embedding."""
        modules = [module for module in model.modules() if isinstance(module, nn.Embedding)]
        embeddings = {id(module.weight) for module in modules}
        return {name: p for name, p in model.named_parameters() if id(p) in embeddings}

    def replacements(
        self, finished: Callable[[], nn.Module], part: Part
    ) -> Iterator[tuple[str, Replacement]]:
        """Yield the client's rows."""
        for name, rows in rows_of(part):
            yield name, Replacement(part[name], rows)

    def carried(self, weights: AdapterWeights, part: Part) -> AdapterWeights:
        """Return the adapter together with the client's rows of the embeddings."""
        found = []
        for name, _ in rows_of(part):
            module = name.removesuffix(".weight")
            if module in {layer.name for layer in weights.layers}:
                raise UserError(
                    f"PEFT cannot keep both LoRA on {module} and rows of it in one adapter: leave "
                    "it out of adapter.target_modules, or set evaluation.save_adapters to false."
                )
            found.append(EmbeddingRows(module, part[name + ROWS], part[name]))
        return replace(weights, rows=tuple(found))
