"""BT-LoRA on any Hugging Face classifier, without a federation: ranks learned from text alone.

    python examples/bt_lora.py [--model MODEL] [--rank 4] [--out FOLDER]

Trains A, B and one λ for each rank together under the Bayesian objective, keeps the r·L ranks with
the largest λ wherever they are, and writes a plain PEFT folder. The text is German package
descriptions; replace `texts` and `labels` by your own. MODEL is a folder or a hub id; the default
is the base model of the quickstart. It takes about half a minute of one core.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fedp2eft import BTLora
from fedp2eft.adapters.export import save_adapter
from fedp2eft.data.debian import load_debian


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="runs/quickstart/base")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/bt-lora"))
    options = parser.parse_args()
    torch.manual_seed(0)

    data = load_debian(languages=["de"], clients_per_language=1, max_train=64)
    (client,) = data.pool("unseen")
    texts = data.rows(client.train)["text"]
    labels = torch.from_numpy(data.label_ids(client.train))

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForSequenceClassification.from_pretrained(
        options.model, num_labels=len(data.labels)
    )
    longest = min(64, model.config.max_position_embeddings)
    rows = tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
    rows["labels"] = labels

    bt = BTLora(model)  # r_max = 32 candidate ranks on every linear layer
    bt.reset(0.5)  # the paper starts λ at 1e-4, from where it takes hundreds of steps to rise
    optimizer = torch.optim.AdamW(
        [{"params": bt.A + bt.B, "lr": 1e-3}, {"params": [bt.lam], "lr": 0.1}], weight_decay=0.0
    )
    for epoch in range(options.epochs):
        for chosen in torch.randperm(len(texts)).split(16):
            batch = {name: values[chosen] for name, values in rows.items()}
            loss = bt.model(**batch).loss + bt.penalty(examples=len(texts))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(bt.A + bt.B, 1.0)
            optimizer.step()
        lam = bt.rank_lambda()
        print(f"epoch {epoch + 1}: λ from {lam.min():.3f} to {lam.max():.3f}")

    weights = bt.trim(options.rank)
    kept = {module: rank for module, rank in weights.ranks.items() if rank}
    print(f"{sum(kept.values())} ranks in {len(kept)} of {len(weights.ranks)} layers")
    folder = save_adapter(weights, options.out, base=options.model)
    print(f"A plain PEFT folder: {folder}")


if __name__ == "__main__":
    main()
