"""BT-LoRA inside Hugging Face's Trainer, and inside trainers that are made of it (TRL's).

    trainer = BTLoraTrainer(model, args=args, train_dataset=rows, rank=4)
    trainer.train()
    trainer.save_model("adapter")

The objective, the learning rate of λ and the clip are those of a client's stage 1 (paper section 3,
`fedp2eft.client.training.stage1`); batches, schedule, logs, devices and checkpoints are the
Trainer's.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, __version__

from fedp2eft.adapters.btlora import BTLora
from fedp2eft.adapters.budget import keep_largest
from fedp2eft.adapters.export import PEFT_TASKS, auto_mapping, save_adapter
from fedp2eft.adapters.weights import AdapterWeights
from fedp2eft.errors import DivergedError, UserError, require
from fedp2eft.settings.experiment import AdapterSettings, check_rank

STATE_FILE = "bt_lora.safetensors"
"""A, B and λ of all ranks, beside the adapter in every checkpoint."""
HOOKS = ("_clip_grad_norm", "_save", "_load_from_checkpoint", "_load_best_model")
"""Methods of the Trainer that are overridden and that transformers does not call public.

The Trainer clips all parameters together, λ included, and saves and loads a PEFT model by PEFT's
own names, which know no λ.
"""


class BTLoraTrainer(Trainer):  # type: ignore[misc]
    """A Trainer that learns which ranks of which layers to keep, with the adapter itself.

    It goes in front of another trainer: `class Tuner(BTLoraTrainer, SFTTrainer): ...`.

    `args.learning_rate` is that of A and B, and `args.max_grad_norm` clips them alone. The logged
    loss is the whole objective L, `penalty` the two penalties in its last step; an evaluation
    reports the task loss. The adapter is evaluated and saved cut to `rank`, and trained whole.

    Args:
        model: A loaded model, whose weights are frozen from here on, or a `BTLora` around one.
        *args: The other arguments of the trainer.
        rank: Rank budget r: the r·L largest of the L·r_max λ are kept. All of them by default.
        lambda_lr: Learning rate of λ; it follows the schedule of `args`.
        alpha_s: Weight of the significance penalty, before division by N.
        alpha_p: Weight of the sparsity penalty, before division by N.
        first_lambda: λ of every rank at the start; a `BTLora` brings its own.
        adapter: Shape and seed of the adapter; a `BTLora` brings its own.
        examples: N, training rows; the length of the training data by default.
        **kwargs: The other arguments of the trainer.

    Attributes:
        bt: The adapter.
        rank: The budget; `trim` changes it.

    Raises:
        UserError: The model cannot be adapted, or an argument does not fit.
    """

    def __init__(
        self,
        model: nn.Module | BTLora,
        *args: Any,
        rank: int | None = None,
        lambda_lr: float = 1e-2,
        alpha_s: float = 100.0,
        alpha_p: float = 0.01,
        first_lambda: float | None = None,
        adapter: AdapterSettings | None = None,
        examples: int | None = None,
        **kwargs: Any,
    ) -> None:
        require(lambda_lr > 0, "lambda_lr must be above 0.")
        require(min(alpha_s, alpha_p) >= 0, "alpha_s and alpha_p must be 0 or more.")
        require(examples is None or examples > 0, "examples must be 1 or more.")
        _check_arguments(model, adapter, first_lambda, kwargs)
        self.bt = model if isinstance(model, BTLora) else BTLora(model, adapter)
        if first_lambda is not None:
            self.bt.reset(first_lambda)
        self.rank = self.bt.settings.r_max if rank is None else rank
        check_rank(self.rank, self.bt.settings.r_max)
        self.lambda_lr, self.alpha_s, self.alpha_p = lambda_lr, alpha_s, alpha_p
        self._examples = examples
        self._penalty = torch.zeros(())
        before = [value.detach().clone() for value in self._trained()]
        super().__init__(self.bt.model, *args, **kwargs)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise UserError("BT-LoRA does not run under DeepSpeed or FSDP: use one GPU, or DDP.")
        if getattr(self.bt.model.get_base_model(), "loss_type", None) != "ForCausalLM":
            # Heads that take **kwargs and ignore `num_items_in_batch` have their losses added up,
            # not averaged, over accumulated mini-batches (transformers' issue 47688).
            self.model_accepts_loss_kwargs = False
        # TRL rounds the adapter of a quantized base to bf16, where a step of λ would be lost.
        for parameter, value in zip(self._trained(), before, strict=True):
            parameter.data = value.to(parameter.device)

    @property
    def examples(self) -> int:
        """N, training rows."""
        if self._examples is not None:
            return self._examples
        try:
            return len(self.train_dataset)
        except TypeError:
            raise UserError(
                "The training data has no length: give its number of rows (examples=)."
            ) from None

    def trim(self, rank: int) -> AdapterWeights:
        """Cut the adapter to its r·L largest λ: what is evaluated and saved from here on.

        Training is not affected: the other ranks are kept in the checkpoints.

        Raises:
            UserError: The budget is not in 1..r_max.
        """
        weights = self.bt.trim(rank)
        self.rank = rank
        return weights

    # ── one step ────────────────────────────────────────────────────────────────────────────────

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Return the Trainer's optimizer, λ in a group of its own."""
        lam = self.bt.lam
        ours = {id(parameter) for parameter in self._trained()}
        for name, parameter in self.bt.model.named_parameters():
            if parameter.requires_grad and id(parameter) not in ours:
                raise UserError(
                    f"{name} would train with the adapter but not be saved with it: "
                    "set requires_grad to False."
                )
        made = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if made:
            for group in optimizer.param_groups:
                group["params"] = [each for each in group["params"] if each is not lam]
            group = {"params": [lam], "lr": self.lambda_lr, "weight_decay": 0.0}
            optimizer.add_param_group(group)
        return optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Train on a mini-batch; the last one of an optimizer step adds the penalties."""
        loss: Tensor = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            # Once per step, however many mini-batches it has: they do not depend on the rows.
            penalty = self.bt.penalty(self.examples, self.alpha_s, self.alpha_p)
            self.accelerator.backward(penalty * self.accelerator.gradient_accumulation_steps)
            self._penalty = penalty.detach()
            loss = loss + self._penalty
        if not bool(torch.isfinite(loss)):  # the Trainer would drop it from the logs
            raise DivergedError(
                f"The loss is {loss.item()} at step {self.state.global_step + 1}: lower the "
                "learning rates, or check the text and the base model."
            )
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Clip A and B together and leave λ alone; returns their norm before."""
        weights = self.bt.A + self.bt.B
        norm: Tensor = self.accelerator.clip_grad_norm_(weights, self.args.max_grad_norm)
        return norm

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the Trainer's values; the training loss with its penalties and the range of λ."""
        if "loss" in logs:
            lam = self.bt.rank_lambda()
            logs |= {
                "penalty": self._penalty.item(),
                "lambda_min": lam.min().item(),
                "lambda_max": lam.max().item(),
            }
        super().log(logs, *args, **kwargs)

    # ── what is evaluated and saved ─────────────────────────────────────────────────────────────

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate the adapter cut to `rank`."""
        with self._trimmed():
            return super().evaluation_loop(*args, **kwargs)

    @contextmanager
    @torch.no_grad()
    def _trimmed(self) -> Iterator[None]:
        """Columns of B of the ranks that are not kept are zero until the end of the block."""
        keep = keep_largest(self.bt.rank_lambda(), self.rank)
        before = [B.clone() for B in self.bt.B]
        for B, kept in zip(self.bt.B, keep, strict=True):
            B[:, ~kept] = 0.0
        try:
            yield
        finally:
            for B, whole in zip(self.bt.B, before, strict=True):
                B.data.copy_(whole)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write the adapter cut to `rank` as a plain PEFT folder, and what resuming needs."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        base = self.bt.model.get_base_model()
        causal = bool(getattr(base, "can_generate", bool)())
        task = "causal_lm" if causal else "classification"
        with tempfile.TemporaryDirectory(dir=folder, prefix=".adapter-") as scratch:
            written = save_adapter(
                self.bt.trim(self.rank),
                Path(scratch) / "adapter",
                base=str(getattr(base, "name_or_path", "")),
                task_type=PEFT_TASKS[task],
                loads=auto_mapping(base),
                facts={"method": "bt-lora", "rank": self.rank, "task": task},
            )
            save_file(self._state(), written / STATE_FILE)
            for file in written.iterdir():  # the folder may hold other checkpoints
                os.replace(file, folder / file.name)
        processor = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if processor is not None:
            processor.save_pretrained(str(folder))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Put A, B and λ of a checkpoint in place of the present ones."""
        path = Path(resume_from_checkpoint) / STATE_FILE
        try:
            found = load_file(path)
        except FileNotFoundError:
            raise UserError(f"{path} is missing: this trainer did not write it.") from None
        except SafetensorError as error:
            raise UserError(f"{path} is damaged ({error}): resume from another.") from error
        B0 = [found.pop(f"B0.{name}") for name in self.bt.names if f"B0.{name}" in found]
        present = self._state()
        for name, value in present.items():
            if name.startswith("B0."):
                continue
            other = found.pop(name, None)
            if other is None or other.shape != value.shape:
                raise UserError(f"{path} belongs to another model or adapter: {name} does not fit.")
            with torch.no_grad():
                value.copy_(other)
        if found:
            raise UserError(f"{path} belongs to another model: it has no {min(found)}.")
        self.bt._B0 = [b.to(B.device) for b, B in zip(B0, self.bt.B, strict=True)] if B0 else None

    def _load_best_model(self) -> None:
        """`load_best_model_at_end`."""
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _trained(self) -> list[nn.Parameter]:
        return [*self.bt.A, *self.bt.B, self.bt.lam]

    def _state(self) -> dict[str, Tensor]:
        """Return values by name: λ, A and B of every layer, and B0 where it is not 0."""
        state = {"lambda": self.bt.lam.detach()}
        for name, A, B in zip(self.bt.names, self.bt.A, self.bt.B, strict=True):
            state |= {f"A.{name}": A.detach(), f"B.{name}": B.detach()}
        for name, value in zip(self.bt.names, self.bt._B0 or [], strict=False):
            state[f"B0.{name}"] = value
        return state


def _check_arguments(
    model: Any, adapter: object, first_lambda: object, others: dict[str, Any]
) -> None:
    """Raise `UserError` for what would be ignored, or give an adapter that fits no saved base."""
    missing = [name for name in HOOKS if not hasattr(Trainer, name)]
    require(not missing, f"transformers {__version__} has no Trainer.{missing[:1]}: install 5.23.")
    if isinstance(model, BTLora):
        given = adapter is not None or first_lambda is not None
        require(not given, "A BTLora brings its own adapter and first_lambda: leave them out.")
    elif not isinstance(model, nn.Module):
        raise UserError("Give a loaded model: Auto….from_pretrained(NAME), not its name.")
    elif isinstance(model, PeftModel):
        raise UserError("This model has an adapter already: give its base model.")
    for name in ("model_init", "peft_config"):
        require(others.get(name) is None, f"{name} is incompatible with BT-LoRA: leave it out.")
    optimizer = (others.get("optimizers") or (None,))[0]
    require(optimizer is None, "λ has an optimizer group of its own: choose one by args.optim.")
    base = model.model if isinstance(model, BTLora) else model
    drawn = _drawn_at_random(base)
    if drawn:
        raise UserError(
            f"{drawn[0]} is not in the model's files but drawn at random, so the adapter would fit "
            "this process alone: save the model by save_pretrained(FOLDER) and load it from there."
        )


def _drawn_at_random(model: nn.Module) -> list[str]:
    """Return weights of a model loaded from files that no file holds: a new head, new embeddings.

    transformers marks what it has read. A model made from its config has no marks at all.
    """
    frozen = [
        (name, getattr(parameter, "_is_hf_initialized", False))
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and ".lora_" not in name
    ]
    return [name for name, read in frozen if not read] if any(r for _, r in frozen) else []
