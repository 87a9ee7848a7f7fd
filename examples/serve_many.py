"""Answer many clients in one batch, each with its own adapter (PEFT's mixed batches).

    fedp2eft quickstart                     # once: trains base, PSG and every client's adapter
    python examples/serve_many.py [--run RUN] [--method fedp2eft-r2]

The base model is in memory once, and every row of a batch names the adapter that it goes through.
The folders are `portable`: all modules at one rank and the scale folded in, as mixed batches want
them. It takes about ten seconds, most of them for starting up.

A causal LM's adapters are served by vLLM from the same folders, one name per client:

    vllm serve RUN/base --enable-lora --max-lora-rank 16 --max-loras 8 \\
      --lora-modules ru=RUN/adapters/ru-seen-00/fedp2eft-r2 de=RUN/adapters/de-seen-00/fedp2eft-r2
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

TEXTS = {
    "de": "Ein Spiel mit Panzern und Raketen für zwei Personen",
    "fr": "bibliothèque pour lire et écrire des images compressées",
    "ja": "端末で使うメールクライアント",
    "ko": "네트워크 패킷을 살펴보는 도구",
    "ru": "редактор звуковых файлов",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--method", default="fedp2eft-r2")
    options = parser.parse_args()

    folders = {
        path.parent.name: path for path in sorted(options.run.glob(f"adapters/*/{options.method}"))
    }
    if not folders:
        raise SystemExit(f"No adapters {options.method} in {options.run}: run the quickstart.")
    base = AutoModelForSequenceClassification.from_pretrained(options.run / "base")
    tokenizer = AutoTokenizer.from_pretrained(options.run / "base")
    first, *others = folders
    model = PeftModel.from_pretrained(base, folders[first], adapter_name=first)
    for client in others:
        model.load_adapter(folders[client], adapter_name=client)
    model.eval()

    clients = [client for client in folders if client.split("-")[0] in TEXTS]
    batch = tokenizer(
        [TEXTS[client.split("-")[0]] for client in clients], padding=True, return_tensors="pt"
    )
    with torch.inference_mode():
        logits = model(**batch, adapter_names=clients).logits
    for client, row in zip(clients, logits, strict=True):
        share, label = row.softmax(dim=0).max(dim=0)
        print(f"{client:14s} {model.config.id2label[int(label)]:9s} {share:.0%}")


if __name__ == "__main__":
    main()
