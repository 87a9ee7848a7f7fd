"""BT-LoRA inside Hugging Face's Trainer: batches, schedule, logs and checkpoints are the Trainer's.

    python examples/trainer.py [--model MODEL] [--rank 4] [--out FOLDER] [--resume]

The text is German package descriptions; replace `rows` by your own. MODEL is a folder or a hub id
of a fine-tuned classifier; the default is the base model of the quickstart. It takes about half a
minute of one core. Stopped, it resumes from its last epoch with --resume.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments

from fedp2eft import BTLoraTrainer
from fedp2eft.data.debian import load_debian


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="runs/quickstart/base")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/trainer"))
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()

    data = load_debian(languages=["de"], clients_per_language=1, max_train=64)
    (client,) = data.pool("unseen")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForSequenceClassification.from_pretrained(options.model)
    longest = min(64, model.config.max_position_embeddings)

    def rows(numbers) -> list[dict]:
        texts, labels = data.rows(numbers)["text"], data.label_ids(numbers)
        return [
            {**tokenizer(text, truncation=True, max_length=longest), "labels": int(label)}
            for text, label in zip(texts, labels, strict=True)
        ]

    args = TrainingArguments(
        str(options.out),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=16,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_strategy="epoch",
        report_to=[],
    )
    trainer = BTLoraTrainer(
        model,
        args,
        train_dataset=rows(client.train),
        eval_dataset=rows(client.test),
        processing_class=tokenizer,
        rank=options.rank,
        first_lambda=0.5,  # the paper starts λ at 1e-4, from where it takes hundreds of steps
        lambda_lr=0.1,
    )
    trainer.train(resume_from_checkpoint=options.resume)
    trainer.save_model(str(options.out / "adapter"))
    ranks = trainer.trim(options.rank).ranks
    print(f"{sum(ranks.values())} ranks in {sum(map(bool, ranks.values()))} of {len(ranks)} layers")
    print(f"A plain PEFT folder: {options.out / 'adapter'}")


if __name__ == "__main__":
    main()
