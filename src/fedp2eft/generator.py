"""The personalization-strategy generator, PSG, with parameters φ (paper section 4).

    ξ (2M) → Linear(2M → 4M) → PReLU → Linear(4M → L·r_max) → clamp → λ̂ (L × r_max)

M linear layers of the base model, L adapted layers. Weights start Xavier-normal with gain 1e-6 and
biases at 1e-4, so an untrained PSG predicts λ̂ near 1e-4 for every rank.
"""

# No `from __future__ import annotations`: PyTorchModelHubMixin reads the annotation of `config`.
import json
import reprlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
import yaml
from huggingface_hub import ModelCard, PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fedp2eft.adapters.clamp import clamp_straight_through
from fedp2eft.errors import UserError
from fedp2eft.seeding import derive_seed
from fedp2eft.settings.experiment import AdapterSettings, GeneratorSettings, ProfileName

GAIN = 1e-6
HIDDEN_BIAS = 1e-4


@dataclass(frozen=True)
class PSGConfig:
    """All that a PSG must agree on with the model and the clients it meets.

    Args:
        base_model: Name of the base model it was trained for.
        base_revision: Hub commit or content hash of that model's weights.
        linear_names: The M linear layers whose inputs ξ describes, in order.
        layer_names: The L adapted layers, in order.
        r_max: Candidate ranks per layer.
        layerwise: One λ per layer instead of one per rank.
        feature_kind: "masked" or "padded" (what ξ averages over).
        log_quantity: Whether log N is the last feature.
        profile: "paper" or "reference".
        hidden_multiplier: Hidden width as a multiple of the number of features.
        init_lambda: λ̂ before training.
        lambda_min: Smallest λ̂.
        lambda_max: Largest λ̂.
        scaling: The factor s of the adapters.
        adapter_seed: Seed of the common A that λ refers to.
        target_modules: PEFT's `target_modules` of the adapters.
        seed: Seed of the first weights.
        max_length: Longest input in tokens of the clients' rows.
        labels: Class names in id order; empty where there are none.
        text_columns: Columns of a client's table that hold the text.
        label_column: Column that holds the label.
        task: "classification" or "causal_lm".
        target_column: Column that holds the response; empty for a classification.
        personalize_lr: Learning rate that personalization takes where none is given.
        personalize_epochs: Likewise its passes over a client's rows.
        batch_size: Likewise its rows per mini-batch.
        accumulate: Likewise its mini-batches per optimiser step.
        dropout: Whether the base's own dropout is on in personalization.
        base: How the base was trained (`settings.BaseSettings` as a mapping): a client that meets
            this PSG gets its own part of the base likewise, where the PSG's clients have one.
        origin: What its card tells of the experiment (`cards.origin_of`); nothing depends on it.
    """

    base_model: str
    base_revision: str
    linear_names: tuple[str, ...]
    layer_names: tuple[str, ...]
    r_max: int
    layerwise: bool = False
    feature_kind: str = "masked"
    log_quantity: bool = False
    profile: str = "paper"
    hidden_multiplier: int = 2
    init_lambda: float = 1e-4
    lambda_min: float = 1e-4
    lambda_max: float = 1000.0
    scaling: float = 2.0
    adapter_seed: int = 0
    target_modules: str | list[str] = "all-linear"
    seed: int = 0
    max_length: int = 128
    labels: tuple[str, ...] = ()
    text_columns: tuple[str, ...] = ("text",)
    label_column: str = "label"
    task: str = "classification"
    target_column: str = ""
    personalize_lr: float = 1e-4
    personalize_epochs: int = 2
    batch_size: int = 32
    accumulate: int = 1
    dropout: bool = True
    base: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("linear_names", "layer_names", "labels", "text_columns"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON knows only lists

    @classmethod
    def of(
        cls,
        adapter: AdapterSettings,
        generator: GeneratorSettings,
        **facts: Any,
    ) -> "PSGConfig":
        """The config that these settings ask for; `facts` are the fields that they do not name."""
        return cls(
            r_max=adapter.r_max,
            layerwise=adapter.layerwise,
            lambda_min=adapter.lambda_min,
            lambda_max=adapter.lambda_max,
            scaling=adapter.scaling,
            adapter_seed=adapter.seed,
            target_modules=adapter.target_modules,
            log_quantity=generator.log_quantity,
            hidden_multiplier=generator.hidden_multiplier,
            init_lambda=generator.init_lambda,
            seed=generator.seed,
            **facts,
        )

    @property
    def n_features(self) -> int:
        """Numbers in ξ: 2M, and one more with `log_quantity`."""
        return 2 * len(self.linear_names) + int(self.log_quantity)

    def adapter_settings(self) -> AdapterSettings:
        """Settings of the adapters that this PSG's λ refers to."""
        return AdapterSettings(
            r_max=self.r_max,
            scaling=self.scaling,
            target_modules=self.target_modules,
            lambda_min=self.lambda_min,
            lambda_max=self.lambda_max,
            layerwise=self.layerwise,
            seed=self.adapter_seed,
        )

    def check_fits(self, other: "PSGConfig") -> None:
        """Raise `UserError` naming the first thing on which a PSG and a setting disagree."""
        what = {
            "base_model": "base model",
            "base_revision": "revision of the base model",
            "r_max": "r_max",
            "layerwise": "layer-wise λ",
            "feature_kind": "feature kind",
            "profile": "profile",
            "log_quantity": "log-quantity feature",
            "linear_names": "linear layers of the base model",
            "layer_names": "adapted layers",
            "adapter_seed": "seed of the common A",
            "scaling": "scaling",
        }
        for name, words in what.items():
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                words = f"another {words}"
                if isinstance(mine, tuple):
                    odd = sorted(set(mine) ^ set(theirs)) or ["their order"]
                    mine, theirs = f"{len(mine)} names", f"{len(theirs)} (first other: {odd[0]})"
                    words = words.replace("another ", "other ")
                raise UserError(
                    f"This PSG was made for {words}: it has {mine}, here it is {theirs}. "
                    "Use the model and settings that it was trained with."
                )


class PSG(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="fedp2eft",
    tags=["fedp2eft", "federated-learning", "lora", "peft"],
    paper_url="https://arxiv.org/abs/2502.04387",
):
    """The network that predicts a client's λ from its features ξ; only φ ever travels.

    Args:
        config: Names, sizes and kind; saved as config.json.

    Attributes:
        card: Its README.md: that of the folder it was loaded from, or of the run that trained it.
    """

    card: ModelCard | None = None

    def __init__(self, config: PSGConfig) -> None:
        super().__init__()
        self.config = config
        columns = 1 if config.layerwise else config.r_max
        hidden = config.hidden_multiplier * config.n_features
        with torch.random.fork_rng(devices=[]):  # first draws that _reset_parameters() replaces
            self.first_layer = nn.Sequential(nn.Linear(config.n_features, hidden), nn.PReLU())
            self.last_layer = nn.Linear(hidden, len(config.layer_names) * columns)
        self._reset_parameters()

    @torch.no_grad()
    def _reset_parameters(self) -> None:
        first = self.first_layer[0]
        assert isinstance(first, nn.Linear)
        generator = torch.Generator(device="cpu").manual_seed(derive_seed("psg", self.config.seed))
        for layer, bias in ((first, HIDDEN_BIAS), (self.last_layer, self.config.init_lambda)):
            nn.init.xavier_normal_(layer.weight, gain=GAIN, generator=generator)
            nn.init.constant_(layer.bias, bias)

    def forward(self, features: Tensor) -> Tensor:
        """Return λ̂ for ξ.

        Args:
            features: ξ, 2M (or 2M + 1) values.

        Returns:
            λ̂ clamped to its range with straight-through gradients: L × r_max, or L × 1 where λ is
            layer-wise.

        Raises:
            UserError: ξ has another length, or NaN or infinity in it.
        """
        if features.shape != (self.config.n_features,):
            raise UserError(
                f"ξ has {features.numel()} values, this PSG expects {self.config.n_features}: "
                "it was made for another model or feature kind."
            )
        if not bool(torch.isfinite(features).all()):
            raise UserError("ξ holds NaN or infinity: check the client's text and the base model.")
        return self.predict(features)

    def predict(self, features: Tensor) -> Tensor:
        """`forward` without its checks, so that `torch.func` can map it over clients."""
        c = self.config
        found = self.last_layer(self.first_layer(features)).reshape(len(c.layer_names), -1)
        return clamp_straight_through(found, c.lambda_min, c.lambda_max)

    def features_of(self, features: Tensor, examples: int) -> Tensor:
        """ξ as this PSG wants it: with log N behind it where `log_quantity` is set."""
        if not self.config.log_quantity:
            return features
        return torch.cat([features, torch.tensor([float(examples)]).log()])

    def generate_model_card(self, *_: Any, **__: Any) -> ModelCard:
        """Return the README.md that `save_pretrained` and `push_to_hub` write."""
        return self.card or super().generate_model_card()

    def phi(self) -> dict[str, Tensor]:
        """φ: parameter name → float32 tensor, detached copies."""
        return {name: value.detach().cpu().clone() for name, value in self.state_dict().items()}

    def set_phi(self, phi: Mapping[str, Tensor], whose: str = "φ") -> None:
        """Take over φ after checking names, shapes and that every number is finite.

        Raises:
            UserError: It does not fit this PSG; the PSG is as it was before.
        """
        check_numbers(phi, self.state_dict(), whose)
        self.load_state_dict(phi)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, name: str | Path, *, revision: str | None = None
    ) -> "PSG":
        """Load a PSG from a folder or the Hugging Face Hub; safetensors only.

        Raises:
            UserError: Not there, not a PSG, damaged, or with numbers that are not finite.
        """
        folder = Path(name).expanduser()
        if folder.is_dir():
            config_path, weights_path = folder / "config.json", folder / "model.safetensors"
        elif str(name).count("/") != 1 or folder.is_absolute():
            raise UserError(f"No PSG at {name}: give its folder, or a hub id like owner/name.")
        else:
            config_path, weights_path = (
                Path(_download(str(name), file, revision))
                for file in ("config.json", "model.safetensors")
            )
            with suppress(UserError):  # a PSG may come without a card
                _download(str(name), "README.md", revision)
        config = _read_config(config_path)
        try:
            phi = load_file(weights_path)
        except FileNotFoundError as error:
            raise UserError(f"No model.safetensors in {name}: this is not a PSG folder.") from error
        except (SafetensorError, OSError) as error:
            raise UserError(f"{weights_path} is damaged ({error}): fetch it again.") from error
        with torch.device("meta"):  # sizes first: a wrong config must not ask for all memory
            check_numbers(phi, cls(config).state_dict(), f"φ in {weights_path}")
        psg = cls(config)
        psg.set_phi(phi)
        psg.card = _read_card(config_path.with_name("README.md"))
        psg.requires_grad_(True)
        return psg.eval()


def check_numbers(phi: Mapping[str, Tensor], like: Mapping[str, Tensor], whose: str) -> None:
    """Raise `UserError` unless `phi` has the names, shapes and finite floats of `like`."""
    if set(phi) != set(like):
        odd = sorted(set(phi) ^ set(like))
        raise UserError(f"{whose} has other parameters than this PSG (first: {odd[0]!r}).")
    for name, value in phi.items():
        if value.shape != like[name].shape:
            raise UserError(
                f"{whose}: {name} has shape {tuple(value.shape)}, "
                f"this PSG expects {tuple(like[name].shape)}."
            )
        if not value.is_floating_point() or not bool(torch.isfinite(value.float()).all()):
            raise UserError(f"{whose}: {name} holds NaN, infinity or no floats; discard it.")


def _read_config(path: Path) -> PSGConfig:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"No config.json in {path.parent}: this is not a PSG folder.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): fetch it again.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path} is not a PSG's.")
    if raw.get("target", "lambda") != "lambda":
        raise UserError(
            f"{path}: this PSG predicts {reprlib.repr(raw['target'])}, not λ (local.prior: "
            "normalized). fedp2eft 0.1.0 was the last version that could use it."
        )
    kinds = get_type_hints(PSGConfig)
    facts = {key: value for key, value in raw.items() if key in kinds}
    for key, value in facts.items():
        if not _is_a(kinds[key], value):
            raise UserError(f"{path} is not a PSG's: {key} is {reprlib.repr(value)}.")
    try:
        config = PSGConfig(**facts)
    except TypeError as error:
        raise UserError(f"{path} is not a PSG's ({error}).") from error
    if config.profile not in get_args(ProfileName):
        raise UserError(f"{path} is not a PSG's: profile is {reprlib.repr(config.profile)}.")
    sizes = (config.r_max, config.hidden_multiplier, len(config.layer_names), config.n_features)
    possible = 0 < config.lambda_min < config.lambda_max and config.init_lambda > 0
    if not all(0 < n < 1_000_000 for n in sizes) or not possible:
        raise UserError(f"{path} is not a PSG's: its sizes or its range of λ are impossible.")
    return config


def _is_a(kind: Any, value: object) -> bool:
    """Whether a value read from JSON is of the type that a field of `PSGConfig` is declared as."""
    if kind is float:
        return type(value) in (int, float) and -1e30 < value < 1e30  # type: ignore[operator]
    if kind in (int, bool, str):
        return type(value) is kind
    if kind == dict[str, Any]:
        return isinstance(value, dict)
    names = isinstance(value, list) and all(isinstance(name, str) for name in value)
    return names or (kind == str | list[str] and isinstance(value, str))


def _read_card(path: Path) -> ModelCard | None:
    """The card beside a PSG, or None if there is none that can be read."""
    try:
        return ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True)
    except (OSError, ValueError, yaml.YAMLError):
        return None


def _download(repo: str, file: str, revision: str | None) -> str:
    try:
        return hf_hub_download(repo, file, revision=revision)
    except HFValidationError as error:
        raise UserError(f"{repo!r} is neither a folder nor a hub id.") from error
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        raise UserError(
            f"Could not get {file} of PSG {repo!r} from the hub ({type(error).__name__}): "
            "check the name and the connection, or give a local folder."
        ) from error
