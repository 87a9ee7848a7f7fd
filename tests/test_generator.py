"""The PSG: shapes, first weights, what it refuses, and its way to disk and back."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict, fields, replace
from importlib.metadata import version
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from fedp2eft.errors import UserError
from fedp2eft.generator import PSG, PSGConfig
from fedp2eft.settings.experiment import AdapterSettings, BaseSettings

CONFIG = PSGConfig(
    base_model="some/base",
    base_revision="abc",
    linear_names=("a", "b", "c"),
    layer_names=("a", "b"),
    adapter=AdapterSettings(r_max=4),
)
XI = torch.tensor([0.3, 1.0, -0.2, 0.5, 2.0, 0.1])


def changed(config: PSGConfig = CONFIG, **changes: Any) -> PSGConfig:
    """The config with changes; `adapter__r_max` is of a section."""
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            value = replace(getattr(config, section), **{name: value})
        config = replace(config, **{section: value})
    return config


def trained(config: PSGConfig = CONFIG) -> PSG:
    """A PSG whose numbers are all different."""
    psg = PSG(config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in psg.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return psg


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# ── shape, first weights, forward ───────────────────────────────────────────────────────────────


def test_names_and_shapes_of_the_parameters() -> None:
    shapes = {name: tuple(value.shape) for name, value in PSG(CONFIG).named_parameters()}
    assert shapes == {
        "first_layer.0.weight": (12, 6),
        "first_layer.0.bias": (12,),
        "first_layer.1.weight": (1,),
        "last_layer.weight": (8, 12),
        "last_layer.bias": (8,),
    }


def test_hidden_width_follows_the_multiplier_and_log_quantity() -> None:
    psg = PSG(changed(CONFIG, generator__hidden_multiplier=5, generator__log_quantity=True))
    assert psg.first_layer[0].weight.shape == (35, 7)


def test_first_weights_are_tiny_and_biases_as_stated() -> None:
    names = tuple(f"layer{i}" for i in range(30))
    phi = PSG(changed(CONFIG, linear_names=names, layer_names=names, adapter__r_max=8)).phi()
    for layer in ("first_layer.0", "last_layer"):
        weight = phi[f"{layer}.weight"]
        xavier = 1e-6 * math.sqrt(2 / sum(weight.shape))
        assert float(weight.std()) == pytest.approx(xavier, rel=0.05)
        assert abs(float(weight.mean())) < xavier / 10
        assert float(weight.abs().max()) > 2.5 * xavier  # normal, not uniform
        assert set(phi[f"{layer}.bias"].tolist()) == {float(torch.tensor(1e-4))}
    assert phi["first_layer.1.weight"].tolist() == [0.25]


def test_an_untrained_psg_predicts_the_first_lambda_for_every_rank() -> None:
    assert torch.allclose(PSG(CONFIG)(XI), torch.full((2, 4), 1e-4), atol=1e-8, rtol=0)
    other = PSG(changed(CONFIG, generator__init_lambda=0.5))(XI)
    assert torch.allclose(other, torch.full((2, 4), 0.5), atol=1e-7, rtol=0)


def test_first_weights_depend_on_the_seed_and_not_on_the_global_random_state() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = PSG(CONFIG).phi()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert same(PSG(CONFIG).phi(), one)
    assert not same(PSG(changed(CONFIG, generator__seed=1)).phi(), one)


def test_forward_equals_the_formula_and_clamps_with_straight_through_gradients() -> None:
    psg = trained(changed(CONFIG, adapter__lambda_min=0.1, adapter__lambda_max=0.4))
    p = {name: value.detach().clone().requires_grad_() for name, value in psg.named_parameters()}
    hidden = p["first_layer.0.weight"] @ XI + p["first_layer.0.bias"]
    hidden = torch.where(hidden > 0, hidden, p["first_layer.1.weight"] * hidden)
    raw = (p["last_layer.weight"] @ hidden + p["last_layer.bias"]).reshape(2, 4)
    got = psg(XI)
    assert torch.allclose(got, raw.clamp(0.1, 0.4), atol=1e-6)
    assert (raw < 0.1).any()
    assert (raw > 0.4).any()
    upstream = torch.arange(8.0).reshape(2, 4) + 1
    got.backward(upstream)
    raw.backward(upstream)  # as if there were no clamp
    for name, parameter in psg.named_parameters():
        assert torch.allclose(parameter.grad, p[name].grad, atol=1e-5), name


def test_layerwise_psg_predicts_one_lambda_per_layer() -> None:
    psg = PSG(changed(CONFIG, adapter__layerwise=True))
    assert psg(XI).shape == (2, 1)
    assert psg.last_layer.weight.shape == (2, 12)


def test_log_quantity_is_the_last_feature() -> None:
    psg = trained(changed(CONFIG, generator__log_quantity=True))
    full = psg.features_of(XI, 50)
    assert torch.equal(full[:-1], XI)
    assert float(full[-1]) == pytest.approx(math.log(50))
    assert not torch.equal(psg(full), psg(psg.features_of(XI, 5000)))
    assert PSG(CONFIG).features_of(XI, 50) is XI


@pytest.mark.parametrize("size", [0, 5, 7])
def test_features_of_another_length_are_an_error(size) -> None:
    with pytest.raises(UserError, match=rf"ξ has {size} values, this PSG expects 6"):
        PSG(CONFIG)(torch.ones(size))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_features_that_are_not_finite_are_an_error(bad) -> None:
    xi = XI.clone()
    xi[3] = bad
    with pytest.raises(UserError, match="NaN or infinity"):
        PSG(CONFIG)(xi)


# ── φ in and out ────────────────────────────────────────────────────────────────────────────────


def test_numbers_are_copies() -> None:
    psg = PSG(CONFIG)
    phi = psg.phi()
    phi["last_layer.bias"].fill_(9)
    assert float(psg.last_layer.bias.detach().max()) < 1e-3


def test_set_phi_takes_over_every_number() -> None:
    psg, other = PSG(CONFIG), trained()
    psg.set_phi(other.phi())
    assert same(psg.phi(), other.phi())


def missing(phi):
    del phi["last_layer.bias"]


def unknown(phi):
    phi["zzz.extra"] = torch.ones(1)


def wrong_shape(phi):
    phi["last_layer.weight"] = phi["last_layer.weight"].T.contiguous()


def holds_nan(phi):
    phi["last_layer.bias"][2] = torch.nan


def holds_infinity(phi):
    phi["first_layer.1.weight"][0] = -torch.inf


def whole_numbers(phi):
    phi["last_layer.bias"] = torch.ones(8, dtype=torch.int64)


def too_large_for_float32(phi):
    phi["last_layer.bias"] = torch.full((8,), 1e300, dtype=torch.float64)


DAMAGE = [
    (missing, r"last_layer\.bias"),
    (unknown, r"zzz\.extra"),
    (wrong_shape, r"last_layer\.weight has shape \(12, 8\).*\(8, 12\)"),
    (holds_nan, r"last_layer\.bias holds NaN"),
    (holds_infinity, r"first_layer\.1\.weight holds NaN, infinity"),
    (whole_numbers, r"last_layer\.bias holds .* no floats"),
    (too_large_for_float32, r"last_layer\.bias holds NaN, infinity"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE, ids=lambda d: getattr(d, "__name__", ""))
def test_damaged_numbers_are_refused_and_the_psg_stays_as_it_was(damage, message) -> None:
    psg = trained()
    before = psg.phi()
    phi = PSG(CONFIG).phi()
    damage(phi)
    with pytest.raises(UserError, match="client 3.*" + message):
        psg.set_phi(phi, "client 3")
    assert same(psg.phi(), before)


# ── on disk ─────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def folder(tmp_path):
    trained().save_pretrained(tmp_path / "psg")
    return tmp_path / "psg"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"adapter__layerwise": True, "generator__log_quantity": True, "profile": "reference"},
        {
            "adapter__target_modules": ["q", "v"],
            "labels": ("no", "yes"),
            "text_columns": ("x", "y"),
        },
        {
            "adapter__lambda_max": 7,
            "generator__init_lambda": 0.25,
            "adapter__seed": 3,
            "adapter__scaling": 1.5,
        },
    ],
    ids=["plain", "flags", "lists", "numbers"],
)
def test_save_and_load_keep_every_bit_and_every_fact(tmp_path, changes) -> None:
    psg = trained(changed(CONFIG, **changes))
    psg.save_pretrained(tmp_path)
    loaded = PSG.from_pretrained(tmp_path)
    assert same(loaded.phi(), psg.phi())
    assert loaded.config == psg.config
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    xi = psg.features_of(XI, 10)
    assert torch.equal(loaded(xi), psg(xi))


def test_config_on_disk_names_everything(folder) -> None:
    written = json.loads((folder / "config.json").read_text())
    assert set(written) == {field.name for field in fields(PSGConfig)}
    assert written["base_model"] == "some/base"
    assert written["linear_names"] == ["a", "b", "c"]


def test_a_config_of_version_0_1_0_had_one_level(folder) -> None:
    """The settings stood beside the names; the first weights of the folder are the same."""
    written = json.loads((folder / "config.json").read_text())
    adapter, generator, local = (written.pop(name) for name in ("adapter", "generator", "local"))
    flat = written | {
        **{name: value for name, value in adapter.items() if name != "seed"},
        **{"adapter_seed": 3, "seed": 4, "init_lambda": 0.25},
        **{name: generator[name] for name in ("log_quantity", "hidden_multiplier")},
        **{name: local[name] for name in ("personalize_lr", "accumulate", "dropout")},
        **{"batch_size": 7, "personalize_epochs": 5, "max_length": 9},
        **{"base": asdict(BaseSettings(kind="fedit")), "target": "lambda"},
    }
    (folder / "config.json").write_text(json.dumps(flat))
    wanted = changed(
        adapter__seed=3, generator__seed=4, generator__init_lambda=0.25, local__batch_size=7,
        local__personalize_epochs=5, local__max_length=9, base=BaseSettings(kind="fedit"),
    )  # fmt: skip
    loaded = PSG.from_pretrained(folder)
    assert loaded.config == wanted
    assert same(loaded.phi(), trained().phi())
    (folder / "config.json").write_text(json.dumps(flat | {"base": {}}))
    assert PSG.from_pretrained(folder).config == replace(wanted, base=BaseSettings())


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_an_error_that_names_it(folder, name) -> None:
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"No {name}"):
        PSG.from_pretrained(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_folder_in_place_of_a_file_is_an_error(folder, name) -> None:
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(UserError, match=name):
        PSG.from_pretrained(folder)


@pytest.mark.parametrize("where", ["/no/such/folder", "no-such-folder", "a/b/c"])
def test_a_place_that_is_no_folder_and_no_hub_id_is_an_error(where) -> None:
    with pytest.raises(UserError, match=f"No PSG at {where}"):
        PSG.from_pretrained(where)


def test_a_hub_id_without_a_connection_is_an_error_that_names_it() -> None:
    with pytest.raises(UserError, match="nobody/no-such-psg"):
        PSG.from_pretrained("nobody/no-such-psg")


@pytest.mark.parametrize("left", [0, 4, 100, -1])
def test_truncated_weights_are_an_error(folder, left) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:left])
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        PSG.from_pretrained(folder)


def test_a_pickle_is_never_read(folder) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(trained().state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"No model\.safetensors"):
        PSG.from_pretrained(folder)
    shutil.copy(folder / "pytorch_model.bin", folder / "model.safetensors")
    with pytest.raises(UserError, match="damaged"):
        PSG.from_pretrained(folder)


@pytest.mark.parametrize(("damage", "message"), DAMAGE, ids=lambda d: getattr(d, "__name__", ""))
def test_damaged_numbers_on_disk_are_an_error_that_names_them(folder, damage, message) -> None:
    phi = trained().phi()
    damage(phi)
    save_file(phi, folder / "model.safetensors")
    with pytest.raises(UserError, match=message):
        PSG.from_pretrained(folder)


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "null", "3", '"psg"', "{}", "[" * 100_000, "\x00", '{"r_max": 4}',
    ],
)  # fmt: skip
def test_a_config_that_describes_no_psg_is_an_error(folder, text) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json"):
        PSG.from_pretrained(folder)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@given(
    garbage=st.dictionaries(
        st.sampled_from([field.name for field in fields(PSGConfig)]), json_values, min_size=1
    )
)
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_garbage_in_any_field_gives_a_psg_that_works_or_an_error(folder, garbage) -> None:
    (folder / "config.json").write_text(json.dumps(asdict(CONFIG) | garbage))
    try:
        psg = PSG.from_pretrained(folder)
    except UserError:
        return
    assert psg(XI).shape == (2, 4)
    again = json.loads(json.dumps(asdict(psg.config)))
    assert again.keys() == asdict(CONFIG).keys()
    for name in ("base_model", "base_revision", "feature_kind", "profile", "label_column"):
        assert isinstance(again[name], str)


@pytest.mark.parametrize(
    "changes",
    [
        {"adapter": {"r_max": 999_999}, "generator": {"hidden_multiplier": 999_999}},  # 48 TB
        {"adapter": {"r_max": 999_999}},
        {"generator": {"hidden_multiplier": 999_999}},
        {"adapter": {"r_max": 10**400}},
        {"adapter": {"r_max": 0}},
        {"adapter": {"r_max": True}},
        {"adapter": 3},
        {"linear_names": "abc"},
        {"layer_names": ["a", 1]},
        {"layer_names": []},
        {"adapter": {"lambda_min": 2000.0}},
        {"adapter": {"lambda_min": float("nan")}},
        {"adapter": {"scaling": None}},
        {"adapter": {"lambda_max": 1e999}},
        {"generator": {"init_lambda": "one"}},
        {"generator": {"init_lambda": 0.0}},
        {"base": {"kind": "unknown"}},
        {"base_model": 5},
    ],
    ids=str,
)
def test_impossible_values_are_an_error_before_any_memory_is_taken(folder, changes) -> None:
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(written | changes))
    with pytest.raises(UserError):
        PSG.from_pretrained(folder)


@pytest.mark.parametrize(
    "later", [{"odd": 1}, {"base": {"odd": 2}}, {"origin": {"odd": 3}}], ids=str
)
def test_a_key_of_a_later_version_is_refused_except_in_what_the_card_tells(folder, later) -> None:
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(written | later))
    if "origin" in later:
        assert PSG.from_pretrained(folder).config.origin == later["origin"]
        return
    with pytest.raises(UserError, match=rf"odd', which fedp2eft {version('fedp2eft')} does not kn"):
        PSG.from_pretrained(folder)


def test_a_psg_of_the_normalized_prior_names_the_last_version_that_had_it(folder) -> None:
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(written | {"target": "lambda"}))
    assert PSG.from_pretrained(folder).config == CONFIG
    (folder / "config.json").write_text(json.dumps(written | {"target": "log-lambda"}))
    with pytest.raises(UserError, match=r"local\.prior: normalized.*0\.1\.0 was the last"):
        PSG.from_pretrained(folder)


# ── does it fit the model at hand? ──────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_revision": "def"}, "another revision of the base model: it has abc, here it is d"),
        ({"adapter__r_max": 8}, "another r_max: it has 4, here it is 8"),
        ({"adapter__layerwise": True}, "another layer-wise λ"),
        ({"feature_kind": "padded"}, "another feature kind: it has masked, here it is padded"),
        ({"profile": "reference"}, "another profile: it has paper, here it is reference"),
        ({"generator__log_quantity": True}, "another log-quantity feature"),
        ({"generator__feature_tokens": 64}, "another sample of tokens for ξ: it has all, here"),
        ({"linear_names": ("a", "b", "x")}, r"other linear layers .* 3 names.*first other: c"),
        ({"layer_names": ("a",)}, r"other adapted layers: it has 2 names.* 1 .*other: b"),
        ({"layer_names": ("b", "a")}, r"other adapted layers: .*their order"),
        ({"adapter__seed": 7}, "another seed of the common A: it has 0, here it is 7"),
        ({"adapter__scaling": 1.0}, "another scaling"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_mismatch_is_an_error_that_says_which(changes, message) -> None:
    with pytest.raises(UserError, match=message):
        CONFIG.check_fits(changed(CONFIG, **changes))


def test_what_does_not_matter_to_the_numbers_fits() -> None:
    CONFIG.check_fits(
        changed(CONFIG, generator__seed=3, labels=("a",), local__max_length=5, text_columns=("t",))
    )
