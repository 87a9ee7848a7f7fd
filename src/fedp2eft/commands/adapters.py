"""`fedp2eft personalize`, `evaluate` and `export`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from fedp2eft.errors import UserError


def personalize_client(
    psg: str,
    model: str,
    data: str,
    rank: int,
    out: str,
    method: str | None = None,
    budget: Literal["ranks", "parameters"] = "ranks",
    layout: Literal["portable", "compact"] = "portable",
    test_data: str | None = None,
    text_columns: list[str] | None = None,
    label_column: str | None = None,
    target_column: str | None = None,
    lr: float | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    device: str = "auto",
    seed: int = 0,
) -> None:
    """Fit one client's adapter. The client need not have taken part in the training.

    Args:
        psg: Folder or hub id of a trained PSG.
        model: Folder or hub id of the base model that the PSG was trained with.
        data: The client's rows: JSON, CSV, TSV or Parquet.
        rank: Budget r, from 1 to the PSG's r_max.
        out: Folder for the adapter.
        method: How the adapter is fitted: auto, fedp2eft, lora, adalora, … (docs/methods.md); those
            that need a federation of their own or a survey of its clients are refused. Default:
            auto if the PSG keeps a choice, else fedp2eft.
        budget: What the adapter may have: as many ranks, or as many parameters, as r ranks on every
            layer. The method places them.
        layout: "portable" loads everywhere, "compact" keeps the true ranks.
        test_data: A second file to score the adapter on.
        text_columns: Columns with the text. Default: the PSG's.
        label_column: Column with the class. Default: the PSG's.
        target_column: Column with the response, for a causal LM. Default: the PSG's.
        lr: Learning rate of A and B. Default: the PSG's.
        epochs: Passes over the rows. Default: the PSG's.
        batch_size: Rows per mini-batch. Default: the PSG's.
        precision: Dtype of the frozen base model.
        device: "auto", "cpu" or "cuda".
        seed: Seed of the mini-batch order.
    """
    options = locals()
    from fedp2eft import api
    from fedp2eft.adapters.export import check_replaceable
    from fedp2eft.generator import PSG

    del options["out"], options["layout"]
    check_replaceable(Path(out).expanduser())  # fail before the work, not after it
    adapter = api.personalize(**options | {"psg": PSG.from_pretrained(psg)})
    adapter.save(out, layout=layout)
    kept = sum(1 for r in adapter.ranks.values() if r)
    print(
        f"Adapter of {sum(adapter.ranks.values())} ranks in {kept} of {len(adapter.ranks)} layers "
        f"({adapter.weights.parameters():,} parameters): {out}"
    )
    if adapter.scores:
        print(adapter.scores)


def evaluate_model(
    model: str,
    data: str,
    adapter: str | None = None,
    text_columns: list[str] | None = None,
    label_column: str | None = None,
    target_column: str | None = None,
    max_length: int | None = None,
    batch_size: int = 64,
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    device: str = "auto",
    generate: bool = False,
    max_new_tokens: int = 256,
) -> None:
    """Score a base model, with or without an adapter, on rows with a class or a response.

    Args:
        model: Folder or hub id of the base model.
        data: Rows with labels or responses: JSON, CSV, TSV or Parquet.
        adapter: Folder of an adapter. Default: score the base model alone.
        text_columns: Columns with the text. Default: the adapter's, or else "text".
        label_column: Column with the class. Default: the adapter's, or else "label".
        target_column: Column with the response: the model is then a causal LM. Default: the
            adapter's.
        max_length: Maximum input length in tokens. Default: the adapter's, also of one that was
            merged into the model, or else 128 (a causal LM: 1024).
        batch_size: Rows per batch.
        precision: Dtype of the base model.
        device: "auto", "cpu" or "cuda".
        generate: Generate the causal LM's answer to every prompt, greedily, and score the texts
            (ROUGE, METEOR, chrF).
        max_new_tokens: Maximum length of a generated text in tokens.
    """
    options = locals()
    from fedp2eft import api

    print(api.evaluate(**options))


def export_adapter(
    adapter: str,
    out: str,
    layout: Literal["portable", "compact", "merged"],
    model: str | None = None,
    precision: Literal["base", "fp32", "bf16"] = "base",
) -> None:
    """Change the layout of an adapter folder.

    Args:
        adapter: Folder of an adapter that this package wrote.
        out: Folder for the new layout.
        layout: "portable" (every module at one rank, loads everywhere), "compact" (true ranks) or
            "merged" (the full model with the adapter in its weights).
        model: Base model. Default: the one that the adapter names.
        precision: Dtype of a merged model. "base" keeps that of the base model.
    """
    if not layout:
        raise UserError("Name a layout: portable, compact or merged.")
    from fedp2eft import api

    api.export(adapter, out, layout, model, precision=precision)
    print(f"{layout}: {out}")
