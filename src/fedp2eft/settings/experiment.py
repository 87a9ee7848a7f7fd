"""Every setting of the method, typed, with the paper's values as defaults.

Nothing heavy is imported here: the command line builds its help from these types.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, TypeVar

from fedp2eft.errors import check_bounds, require
from fedp2eft.settings.data import DataSettings
from fedp2eft.settings.peers import AggregationSettings, PeerSettings, PrivacySettings

ProfileName = Literal["paper", "reference"]
Wire = Literal["fp32", "bf16", "int8"]
LogitAdjustment = Literal["none", "own"]
LabelPrior = Literal["counts", "predicted", "uniform"]
TaskName = Literal["classification", "causal_lm"]
Quantize = Literal["none", "8bit", "4bit"]
T = TypeVar("T")
Budget = Literal["ranks", "parameters"]
TrackerName = Literal["tensorboard", "wandb", "mlflow"]
PoolName = Literal["seen", "unseen", "new-language"]
BaseKind = Literal[
    "standard-fl", "fedit", "ffa-lora", "feddpa-t", "dept-spec", "none", "off-the-shelf"
]


@dataclass(frozen=True)
class AdapterSettings:
    """The sparse-rank adapter of every client (BT-LoRA, paper section 3).

    Args:
        r_max: Initial ranks per adapted layer, and the largest rank budget.
        scaling: Factor s in W + s·B·diag(λ)·A, before and after trimming.
        target_modules: PEFT's `target_modules`. "all-linear" adapts every linear layer except a
            causal LM's output head.
        lambda_min: Lower bound of λ in the penalties and the forward pass.
        lambda_max: Upper bound of λ in the penalties and the forward pass; under differential
            privacy the lower one of this and privacy.lambda_max.
        layerwise: Use one λ per layer instead of one per rank.
        seed: Seed of the common A. Must be the same for all clients.
    """

    r_max: int = 32
    scaling: float = 2.0
    target_modules: str | list[str] = "all-linear"
    lambda_min: float = 1e-4
    lambda_max: float = 1000.0
    layerwise: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_bounds("adapter", self, {"1 or more": "r_max", "above 0": "scaling"})
        require(
            0 < self.lambda_min < self.lambda_max,
            f"adapter.lambda_min ({self.lambda_min}) must be above 0 and below "
            f"adapter.lambda_max ({self.lambda_max}).",
        )


@dataclass(frozen=True)
class GeneratorSettings:
    """The personalization-strategy generator, PSG (paper section 4).

    Args:
        hidden_multiplier: Width of the hidden layer as a multiple of the number of features.
        init_lambda: λ̂ that an untrained PSG predicts for every rank (the bias of its last layer).
        log_quantity: Add log N (N training examples) to the features.
        label_features: Add log p − log q, the client's label prior, to the features (C values).
        feature_tokens: Compute ξ from a random sample of the client's training rows, at most so
            many tokens in all and at least one row. "all": from all rows, as in the paper.
        steps: Adam steps of stage 2 per round.
        lr: Learning rate of stage 2.
        seed: Seed of the PSG's initial weights, and of the sample of rows for ξ.
    """

    hidden_multiplier: int = 2
    init_lambda: float = 1e-4
    log_quantity: bool = False
    label_features: bool = False
    feature_tokens: int | Literal["all"] = "all"
    steps: int = 10
    lr: float = 1e-4
    seed: int = 0

    def __post_init__(self) -> None:
        bounds = {"0 or more": "steps", "1 or more": "hidden_multiplier"}
        check_bounds("generator", self, bounds | {"above 0": "lr init_lambda"})
        require(
            self.feature_tokens == "all" or self.feature_tokens >= 1,
            f'generator.feature_tokens is {self.feature_tokens}; give 1 or more, or "all".',
        )


@dataclass(frozen=True)
class LocalSettings:
    """Training on the client: stage 1 of a round, and personalization.

    Args:
        epochs: Passes over the client's training rows in stage 1.
        batch_size: Rows per mini-batch.
        accumulate: Mini-batches per optimizer step.
        lr: Learning rate of A and B in stage 1.
        lambda_lr: Learning rate of λ in stage 1.
        personalize_lr: Learning rate of A and B in personalization and in the LoRA baseline.
        personalize_epochs: Passes over the client's training rows in personalization.
        alpha_task: Weight of the task loss in stage 1.
        alpha_s: Weight of the significance penalty, before division by N.
        alpha_p: Weight of the sparsity penalty, before division by N.
        max_grad_norm: Clip the gradient norm of A and B (λ is not clipped).
        dropout: Use the base model's own dropout while training.
        logit_adjustment: "own" adds the client's label prior, log p − log q, to the logits of a
            classification in training and in prediction, for every method that trains and for
            stage 1: p are the client's label frequencies, q is `label_prior`. The adapter carries
            it.
        label_prior: Where q comes from. "counts": the seen clients' label counts, asked once as a
            sum. "predicted": the base's mean prediction over the seen clients' text, for clients
            that will not send counts. "uniform": all classes alike; nothing is asked.
        max_length: Maximum input length in tokens; longer rows are truncated.
        eval_batch_size: Rows per batch without gradients (ξ and scores).
    """

    epochs: int = 2
    batch_size: int = 32
    accumulate: int = 1
    lr: float = 1e-4
    lambda_lr: float = 1e-2
    personalize_lr: float = 1e-4
    personalize_epochs: int = 2
    alpha_task: float = 1.0
    alpha_s: float = 100.0
    alpha_p: float = 0.01
    max_grad_norm: float = 1.0
    dropout: bool = True
    logit_adjustment: LogitAdjustment = "none"
    label_prior: LabelPrior = "counts"
    max_length: int = 128
    eval_batch_size: int = 64

    def __post_init__(self) -> None:
        bounds = {
            "0 or more": "epochs personalize_epochs alpha_task alpha_s alpha_p",
            "1 or more": "batch_size accumulate max_length eval_batch_size",
            "above 0": "lr lambda_lr personalize_lr max_grad_norm",
        }
        check_bounds("local", self, bounds)


@dataclass(frozen=True)
class ModelSettings:
    """The frozen base model.

    Args:
        name: Folder or hub id of a Hugging Face model.
        revision: Commit of the hub model. Default: the newest.
        task: "classification" (one class per text) or "causal_lm" (a response to a prompt).
        precision: Dtype of the frozen base model. "auto" uses bf16 where the device multiplies it
            faster than fp32. Adapters, λ, the PSG and the penalties are always fp32.
        quantize: Load the weights of the linear layers in 8 or 4 bits (bitsandbytes, extra
            `quantized`) while PSG and adapters train. The run stores the full base model.
        gradient_checkpointing: Recompute each block's forward pass in the backward pass: less
            memory, more time.
        device: "auto", "cpu", "cuda" or "cuda:1".
        seed: Seed of a new classification head, if the model has none.
        states_mib: Memory per process, in MiB, for hidden states that enter the lowest trained or
            adapted block: where nothing below it changes, they are computed once per text. 0
            computes them in every pass.
    """

    name: str = "intfloat/multilingual-e5-small"
    revision: str | None = None
    task: TaskName = "classification"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    quantize: Quantize = "none"
    gradient_checkpointing: bool = False
    device: str = "auto"
    seed: int = 0
    states_mib: int = 512

    def __post_init__(self) -> None:
        check_bounds("model", self, {"0 or more": "states_mib"})


@dataclass(frozen=True)
class BaseSettings:
    """Federated training of the base model, before the PSG.

    Args:
        kind: "standard-fl": FedAvg of full fine-tuning. "fedit": FedAvg of LoRA. "ffa-lora": the
            same with A fixed. "feddpa-t": "fedit", then one more LoRA per client that stays there.
            "dept-spec": "standard-fl" with embeddings that stay on the client. "none" (or
            "off-the-shelf"): no training.
        rounds: Federated rounds.
        clients_per_round: Seen clients sampled per round.
        epochs: Passes over a client's training rows per round.
        steps: Optimizer steps per round, instead of `epochs`; the rows repeat as often as needed.
            Each step takes local.accumulate mini-batches.
        batch_size: Rows per mini-batch.
        lr: Learning rate.
        schedule: "constant", or "cosine": half a cosine over the rounds, from `lr` down to 0.
        train_embeddings: Train the token embeddings too (ignored by the kinds with LoRA). They are
            most of a small multilingual model: without them, the messages of "standard-fl" are
            several times smaller.
        target_modules: Names of the modules to train, as in adapter.target_modules; the parts of a
            module that is named are trained, too, and all else stays as it is. Default: all; for
            the kinds with LoRA, every linear layer.
        lora_rank: Rank of the LoRA of "fedit", "ffa-lora" and "feddpa-t", on every linear layer.
        lora_alpha: Alpha of that LoRA; B·A is scaled by alpha / rank.
        lora_dropout: Input dropout of that LoRA in training, if local.dropout is on.
        logit_adjustment: "own" adds each client's label prior to its logits while it trains the
            base (see `local.logit_adjustment`).
        held_out: Share of the seen clients whom the base is not trained on. They train the PSG, and
            they alone answer when methods are tried on held-out rows ("auto", the tuned methods,
            "label-prior"): on rows that the base knows, an adapter looks useless.
    """

    kind: BaseKind = "standard-fl"
    rounds: int = 100
    clients_per_round: int = 30
    epochs: int = 2
    steps: int | None = None
    batch_size: int = 32
    lr: float = 5e-5
    schedule: Literal["constant", "cosine"] = "constant"
    train_embeddings: bool = True
    target_modules: str | list[str] | None = None
    lora_rank: int = 8
    lora_alpha: float = 8.0
    lora_dropout: float = 0.05
    logit_adjustment: LogitAdjustment = "none"
    held_out: float = 0.0

    def __post_init__(self) -> None:
        if self.kind == "off-the-shelf":
            object.__setattr__(self, "kind", "none")  # one stored name, which older runs have
        bounds = {
            "0 or more": "rounds epochs",
            "1 or more": "clients_per_round steps batch_size lora_rank",
            "above 0": "lr lora_alpha",
            "at least 0 and below 1": "lora_dropout held_out",
        }
        check_bounds("base", self, bounds)


@dataclass(frozen=True)
class FederationSettings:
    """Federated training of the PSG.

    Args:
        rounds: Federated rounds.
        clients_per_round: Seen clients sampled per round.
        profile: "paper" follows the paper; "reference" copies where its public implementation
            differs, so that results can be compared.
        keep_checkpoints: Finished rounds to keep on disk. Runs resume from the newest.
        timeout: Seconds to wait for the replies of a round; later replies are ignored. Surveys and
            personalization end after this many seconds without a reply.
        min_clients: Clients that must be connected to start the run, and seen clients to start each
            round (all of them if there are fewer). Ignored by the local engine.
        wait: Seconds to wait for them. Then the run ends, and can be resumed.
        wire: Dtype of φ in messages. "bf16" and "int8" send rounded changes to the server, with
            error feedback on the client, and φ in bf16 to the clients.
        cohort: Clients of a round that the local engine trains in one batch; results are the same
            up to rounding. "auto" is 1: more has not been measured on a GPU yet. They train one at
            a time where the base model has dropout and local.dropout is on, on layers other than
            nn.Linear, and where clients have a part of the base of their own (base.kind feddpa-t or
            dept-spec).
    """

    rounds: int = 150
    clients_per_round: int = 30
    profile: ProfileName = "paper"
    keep_checkpoints: int = 2
    timeout: float = 3600.0
    min_clients: int = 1
    wait: float = 60.0
    wire: Wire = "fp32"
    cohort: int | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        bounds = {
            "0 or more": "rounds wait",
            "1 or more": "clients_per_round min_clients",
            "2 or more": "keep_checkpoints",
            "above 0": "timeout",
        }
        check_bounds("federation", self, bounds)
        require(
            self.cohort == "auto" or self.cohort >= 1,
            f'federation.cohort is {self.cohort}; give a whole number of 1 or more, or "auto".',
        )

    @property
    def cohort_size(self) -> int:
        """Clients at once."""
        return 1 if self.cohort == "auto" else self.cohort


@dataclass(frozen=True)
class EvaluationSettings:
    """Personalization and scores of the clients after training.

    Args:
        methods: Methods to compare; by default base, lora and fedp2eft, and for a classification
            also majority and prior, for a causal LM unigram, which train nothing.
        ranks: Budgets r, each at most adapter.r_max.
        budget: What a budget of r allows an adapter: as many "ranks" as r on every layer are, as in
            the paper, or as many "parameters" as those have (a rank of a layer has d_in + d_out).
        pools: Client pools to personalize and score.
        save_adapters: Save every FedP²EFT adapter in the run folder.
        layout: Layout of saved adapters.
        generate: Generate each causal LM's answers to its client's test prompts, greedily, and
            score them (ROUGE, METEOR, chrF) in addition to the response loss.
        max_new_tokens: Maximum length of a generated text in tokens.
    """

    methods: list[str] = field(default=None)  # type: ignore[arg-type]  # `Settings` sets it
    ranks: list[int] = field(default_factory=lambda: [2, 4, 8, 16])
    budget: Budget = "ranks"
    pools: list[PoolName] = field(default_factory=lambda: ["seen", "unseen"])
    save_adapters: bool = True
    layout: Literal["portable", "compact"] = "portable"
    generate: bool = False
    max_new_tokens: int = 256

    def __post_init__(self) -> None:
        check_bounds("evaluation", self, {"1 or more": "max_new_tokens"})


@dataclass(frozen=True)
class CompareSettings:
    """What `fedp2eft compare` varies, besides the methods, ranks and pools of `evaluation`.

    Args:
        bases: Values of base.kind to compare. Default: base.kind alone.
        seeds: Seeds to repeat everything with. Each replaces all other seeds: partition, initial
            weights (head, common A, PSG), sampling and mini-batches.
    """

    bases: list[BaseKind] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [42, 52, 62])

    def __post_init__(self) -> None:
        require(bool(self.seeds), "compare.seeds is empty: give at least one.")


DEFAULT_METHODS: dict[TaskName, list[str]] = {
    "classification": ["majority", "base", "prior", "calibrated-prior", "lora", "fedp2eft"],
    "causal_lm": ["base", "unigram", "lora", "fedp2eft"],
}


@dataclass(frozen=True)
class Settings:
    """One experiment, read from YAML and command-line options.

    Methods add sections of their own (`fedp2eft.settings.reading`).

    Args:
        seed: Seed of client sampling and of mini-batch order.
        data: The clients and their text.
        model: The frozen base model.
        base: Federated training of the base model, before the PSG.
        adapter: The sparse-rank adapter.
        generator: The PSG.
        local: Training on the client.
        federation: Federated training of the PSG.
        peers: Checks of the clients' replies.
        aggregation: How the server averages.
        privacy: Differential privacy of φ, and secure sums.
        evaluation: Personalization and scores after training.
        compare: What `fedp2eft compare` varies; other commands ignore it.
        trackers: Trackers that `train` and `flwr run` send metrics and final tables to, in addition
            to the run folder: "tensorboard" (extra `trackers`), "wandb" or "mlflow".
    """

    seed: int = 42
    data: DataSettings = field(default_factory=DataSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    base: BaseSettings = field(default_factory=BaseSettings)
    adapter: AdapterSettings = field(default_factory=AdapterSettings)
    generator: GeneratorSettings = field(default_factory=GeneratorSettings)
    local: LocalSettings = field(default_factory=LocalSettings)
    federation: FederationSettings = field(default_factory=FederationSettings)
    peers: PeerSettings = field(default_factory=PeerSettings)
    aggregation: AggregationSettings = field(default_factory=AggregationSettings)
    privacy: PrivacySettings = field(default_factory=PrivacySettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    compare: CompareSettings = field(default_factory=CompareSettings)
    trackers: list[TrackerName] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.evaluation.methods is None:
            methods = DEFAULT_METHODS[self.model.task]
            evaluation = replace(self.evaluation, methods=list(methods))
            object.__setattr__(self, "evaluation", evaluation)
        for rank in self.evaluation.ranks:
            check_rank(rank, self.adapter.r_max)
        if self.privacy.on and self.adapter.lambda_max > self.privacy.lambda_max:
            adapter = replace(self.adapter, lambda_max=self.privacy.lambda_max)
            object.__setattr__(self, "adapter", adapter)
        self.privacy.check(self.aggregation, self.peers, self.federation.wire)
        self._check_label_prior()
        require(
            self.model.task == "causal_lm" or not self.evaluation.generate,
            "evaluation.generate needs a model that generates text: set it to false, or "
            "model.task to causal_lm.",
        )

    def value(self, name: str) -> Any:
        """Return a setting by its name on the command line, e.g. "local.lr"."""
        section, _, key = name.partition(".")
        return getattr(getattr(self, section), key)

    def section(self, kind: type[T]) -> T:
        """Return the section of that class, a method's (`Method.settings`) or one named above."""
        found = (getattr(self, part.name) for part in fields(self))
        return next((value for value in found if isinstance(value, kind)), kind())

    def _check_label_prior(self) -> None:
        """Refuse a label prior without classes, or a base trained with its own predictions."""
        wanted = {
            "local.logit_adjustment": self.local.logit_adjustment != "none",
            "base.logit_adjustment": self.base.logit_adjustment != "none",
            "generator.label_features": self.generator.label_features,
        }
        for name, on in wanted.items():
            require(
                self.model.task == "classification" or not on,
                f"{name} needs classes, and model.task is {self.model.task}: leave it out.",
            )
        require(
            not wanted["base.logit_adjustment"] or self.local.label_prior != "predicted",
            "local.label_prior: predicted is what the trained base predicts, so the base cannot be "
            "trained with it: set it to counts or uniform, or base.logit_adjustment to none.",
        )


def check_rank(rank: int, r_max: int) -> None:
    """Raise `UserError` unless the rank budget lies in 1..r_max."""
    require(
        1 <= rank <= r_max,
        f"Rank budget {rank} is not possible: give a whole number from 1 to r_max = {r_max}.",
    )
