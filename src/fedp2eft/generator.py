"""The personalization-strategy generator, PSG, with parameters φ (paper section 4).

    ξ (2M) → Linear(2M → 4M) → PReLU → Linear(4M → L·r_max) → clamp → λ̂ (L × r_max)

M linear layers of the base model, L adapted layers. Weights start Xavier-normal with gain 1e-6 and
biases at 1e-4, so an untrained PSG predicts λ̂ near 1e-4 for every rank.
"""

# No `from __future__ import annotations`: PyTorchModelHubMixin reads the annotation of `config`.
import json
import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field, is_dataclass
from importlib.metadata import version
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import ModelCard, PyTorchModelHubMixin, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fedp2eft.adapters.gates import clamp_straight_through
from fedp2eft.errors import UserError, shortened
from fedp2eft.seeding import derive_seed
from fedp2eft.settings.experiment import (
    AdapterSettings,
    BaseSettings,
    GeneratorSettings,
    LocalSettings,
    ProfileName,
    TaskName,
)
from fedp2eft.settings.words import typed, types_of

PSG_FILES = ["config.json", "model.safetensors", "README.md"]
GAIN = 1e-6
HIDDEN_BIAS = 1e-4


@dataclass(frozen=True)
class PSGConfig:
    """What a PSG must have in common with the model and the clients it is used for.

    Args:
        base_model: Name of the base model it was trained for.
        base_revision: Hub commit or content hash of that model's weights.
        linear_names: The M linear layers whose inputs ξ describes, in order.
        layer_names: The L adapted layers, in order.
        feature_kind: "masked" or "padded" (what ξ averages over).
        profile: "paper" or "reference".
        task: "classification" or "causal_lm".
        labels: Class names in id order; empty if there are none.
        text_columns: Columns of a client's table that hold the text.
        label_column: Column that holds the label.
        target_column: Column that holds the response; empty for a classification.
        adapter: The adapters that its λ refers to.
        generator: Its own shape and first weights.
        local: How a client personalizes: learning rate, epochs, batch size, longest input.
        base: How the base was trained: a client that meets this PSG gets its own part of the base
            likewise, where the PSG's clients have one.
        label_prior: q, the label distribution that the base was trained on; empty if nothing needed
            it.
        choices: What seen clients answered that a client alone needs (`Method.kept`), by method and
            budget (`fedp2eft.results.at_budget`), "auto-r8" say: tensors as nested lists, by name.
        origin: For its card (`cards.origin_of`); nothing depends on it.
    """

    base_model: str
    base_revision: str
    linear_names: tuple[str, ...]
    layer_names: tuple[str, ...]
    feature_kind: str = "masked"
    profile: ProfileName = "paper"
    task: TaskName = "classification"
    labels: tuple[str, ...] = ()
    text_columns: tuple[str, ...] = ("text",)
    label_column: str = "label"
    target_column: str = ""
    adapter: AdapterSettings = field(default_factory=AdapterSettings)
    generator: GeneratorSettings = field(default_factory=GeneratorSettings)
    local: LocalSettings = field(default_factory=LocalSettings)
    base: BaseSettings = field(default_factory=BaseSettings)
    label_prior: tuple[float, ...] = ()
    choices: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, Any] = field(default_factory=dict)

    @property
    def n_features(self) -> int:
        """Values in ξ: 2M, one more with `log_quantity`, and C more with `label_features`."""
        labels = len(self.labels) if self.generator.label_features else 0
        return 2 * len(self.linear_names) + int(self.generator.log_quantity) + labels

    def check_fits(self, other: "PSGConfig") -> None:
        """Raise `UserError` that names the first difference between a PSG and a workspace."""
        for name, words in _MUST_AGREE.items():
            mine, theirs = attrgetter(name)(self), attrgetter(name)(other)
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


_MUST_AGREE = {
    "base_revision": "revision of the base model",
    "adapter.r_max": "r_max",
    "adapter.layerwise": "layer-wise λ",
    "generator.label_features": "label features",
    "generator.feature_tokens": "sample of tokens for ξ",
    "local.logit_adjustment": "logit adjustment",
    "feature_kind": "feature kind",
    "profile": "profile",
    "generator.log_quantity": "log-quantity feature",
    "linear_names": "linear layers of the base model",
    "layer_names": "adapted layers",
    "adapter.seed": "seed of the common A",
    "adapter.scaling": "scaling",
}
_FLAT = {
    "adapter": "r_max layerwise lambda_min lambda_max scaling target_modules",
    "generator": "log_quantity hidden_multiplier init_lambda seed",
    "local": "max_length personalize_lr personalize_epochs batch_size accumulate dropout",
}
"""What fedp2eft 0.1.0 kept of each section in config.json, which had one level."""


class PSG(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="fedp2eft",
    tags=["fedp2eft", "federated-learning", "lora", "peft"],
    paper_url="https://arxiv.org/abs/2502.04387",
):
    """The network that predicts a client's λ from its features ξ; clients send only φ.

    Args:
        config: Names, sizes and kind; saved as config.json.

    Attributes:
        card: Its README.md: that of the folder it was loaded from, or of the run that trained it.
    """

    card: ModelCard | None = None

    def __init__(self, config: PSGConfig) -> None:
        super().__init__()
        self.config = config
        columns = 1 if config.adapter.layerwise else config.adapter.r_max
        hidden = config.generator.hidden_multiplier * config.n_features
        with torch.random.fork_rng(devices=[]):  # first draws that _reset_parameters() replaces
            self.first_layer = nn.Sequential(nn.Linear(config.n_features, hidden), nn.PReLU())
            self.last_layer = nn.Linear(hidden, len(config.layer_names) * columns)
        self._reset_parameters()

    @torch.no_grad()
    def _reset_parameters(self) -> None:
        first = self.first_layer[0]
        assert isinstance(first, nn.Linear)
        generator = torch.Generator(device="cpu").manual_seed(
            derive_seed("psg", self.config.generator.seed)
        )
        for layer, bias in (
            (first, HIDDEN_BIAS),
            (self.last_layer, self.config.generator.init_lambda),
        ):
            nn.init.xavier_normal_(layer.weight, gain=GAIN, generator=generator)
            nn.init.constant_(layer.bias, bias)

    def forward(self, features: Tensor, checked: bool = True) -> Tensor:
        """Return λ̂ for ξ.

        Args:
            features: ξ, 2M (or 2M + 1) values.
            checked: Whether ξ is looked at first, which `torch.func` cannot map over clients.

        Returns:
            λ̂ clamped to its range with straight-through gradients: L × r_max, or L × 1 where λ is
            layer-wise.

        Raises:
            UserError: ξ has another length, or NaN or infinity in it.
        """
        if checked and features.shape != (self.config.n_features,):
            raise UserError(
                f"ξ has {features.numel()} values, this PSG expects {self.config.n_features}: "
                "it was made for another model or feature kind."
            )
        if checked and not bool(torch.isfinite(features).all()):
            raise UserError("ξ holds NaN or infinity: check the client's text and the base model.")
        c = self.config
        found = self.last_layer(self.first_layer(features)).reshape(len(c.layer_names), -1)
        return clamp_straight_through(found, c.adapter.lambda_min, c.adapter.lambda_max)

    def features_of(
        self, features: Tensor, examples: int, label_offset: Tensor | None = None
    ) -> Tensor:
        """Return ξ as this PSG wants it.

        Args:
            features: ξ, 2M values.
            examples: N; its log is added with `log_quantity`.
            label_offset: log p − log q, C values; added with `label_features`.
        """
        if self.config.generator.log_quantity:
            features = torch.cat([features, torch.tensor([float(examples)]).log()])
        if self.config.generator.label_features:
            if label_offset is None:
                raise UserError("This PSG uses the client's label prior: give q and labels.")
            features = torch.cat([features, label_offset])
        return features

    def generate_model_card(self, *_: Any, **__: Any) -> ModelCard:
        """Return the README.md that `save_pretrained` and `push_to_hub` write."""
        return self.card or super().generate_model_card()

    def phi(self) -> dict[str, Tensor]:
        """Return φ: parameter name → float32 tensor, detached copies."""
        return {name: value.detach().cpu().clone() for name, value in self.state_dict().items()}

    def set_phi(self, phi: Mapping[str, Tensor], whose: str = "φ") -> None:
        """Load φ after checking names, shapes and finite values.

        Raises:
            UserError: It does not fit this PSG; the PSG is as it was before.
        """
        check_parameters(phi, self.state_dict(), whose)
        self.load_state_dict(phi)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, name: str | Path, *, revision: str | None = None
    ) -> "PSG":
        """Load a PSG from a folder or the Hugging Face Hub; safetensors only.

        Raises:
            UserError: Not there, not a PSG, damaged, or with parameters that are not finite.
        """
        folder = Path(name).expanduser()
        if not folder.is_dir():
            if str(name).count("/") != 1 or folder.is_absolute():
                raise UserError(f"No PSG at {name}: give its folder, or a hub id like owner/name.")
            folder = _download(str(name), revision)
        config = _read_config(folder / "config.json")
        weights_path = folder / "model.safetensors"
        try:
            phi = load_file(weights_path)
        except FileNotFoundError as error:
            raise UserError(f"No model.safetensors in {name}: this is not a PSG folder.") from error
        except (SafetensorError, OSError) as error:
            raise UserError(f"{weights_path} is damaged ({error}): fetch it again.") from error
        with torch.device("meta"):  # sizes first: a wrong config must not ask for all memory
            check_parameters(phi, cls(config).state_dict(), f"φ in {weights_path}")
        psg = cls(config)
        psg.set_phi(phi)
        psg.card = _read_card(folder / "README.md")
        psg.requires_grad_(True)
        return psg.eval()


def check_parameters(phi: Mapping[str, Tensor], like: Mapping[str, Tensor], whose: str) -> None:
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
        raise UserError(f"{path} is not the config of a PSG.")
    if raw.get("target", "lambda") != "lambda":
        raise UserError(
            f"{path}: this PSG predicts {reprlib.repr(raw['target'])}, not λ (local.prior: "
            "normalized). fedp2eft 0.1.0 was the last version that could use it."
        )
    raw = _nested(raw)
    _check_known(PSGConfig, raw, path)
    try:
        config: PSGConfig = typed(PSGConfig, raw, "config")
    except (UserError, RecursionError) as error:
        raise UserError(
            f"{path} is not the config of a PSG: {shortened(str(error), 200)}."
        ) from error
    a, g = config.adapter, config.generator
    sizes = (a.r_max, g.hidden_multiplier, len(config.layer_names), config.n_features)
    scales = (a.scaling, a.lambda_max, g.init_lambda)
    if not all(0 < n < 1_000_000 for n in sizes) or not all(map(math.isfinite, scales)):
        raise UserError(
            f"{path} is not the config of a PSG: its sizes or range of λ are impossible."
        )
    return config


def _nested(raw: dict[str, Any]) -> dict[str, Any]:
    """Return the config with nested sections, as versions after 0.1.0 write it."""
    if "r_max" not in raw:
        return {key: value for key, value in raw.items() if key != "target"}
    made = {
        section: {name: raw[name] for name in names.split() if name in raw}
        for section, names in _FLAT.items()
    }
    made["adapter"] |= {"seed": raw.get("adapter_seed", 0)}
    flat = {"adapter_seed", "target", *" ".join(_FLAT.values()).split()}
    return {key: value for key, value in raw.items() if key not in flat} | made


def _check_known(kind: Any, raw: Any, path: Path, where: str = "") -> None:
    """Raise `UserError` for a key that only a later version can know: it may change results."""
    if not is_dataclass(kind) or not isinstance(raw, dict):
        return
    kinds = types_of(kind)
    for key, value in raw.items():
        if key not in kinds:
            raise UserError(
                f"{path} has {shortened(where + key)}, which fedp2eft {version('fedp2eft')} does "
                "not know: update fedp2eft, or use the version that wrote it."
            )
        _check_known(kinds[key], value, path, f"{where}{key}.")


def _read_card(path: Path) -> ModelCard | None:
    """Return the card beside a PSG, or None if there is none that can be read."""
    try:
        return ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True)
    except (OSError, ValueError, yaml.YAMLError):
        return None


def _download(repo: str, revision: str | None) -> Path:
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=PSG_FILES))
    except HFValidationError as error:
        raise UserError(f"{repo!r} is neither a folder nor a hub id.") from error
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        raise UserError(
            f"Could not get PSG {repo!r} from the hub ({type(error).__name__}): "
            "check the name and the connection, or give a local folder."
        ) from error
