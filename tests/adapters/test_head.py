"""A label prior inside an adapter: plain PEFT in another process gives the same logits."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from fedp2eft.adapters.btlora import BTLora
from fedp2eft.adapters.export import auto_mapping, load_adapter, save_adapter
from fedp2eft.adapters.head import head_of, with_head
from fedp2eft.errors import UserError
from fedp2eft.methods.prior import no_ranks
from fedp2eft.settings.experiment import AdapterSettings
from tiny import CLASSES, disturb, random_lambda, tiny
from tiny_run import plain_python

OFFSET = torch.tensor([1.5, -0.5, 0.25])
IDS = torch.arange(1, 13).reshape(2, 6)
PLAIN_PEFT = """
import sys, json, torch
from peft import AutoPeftModelForSequenceClassification, PeftModel
from transformers import AutoModelForSequenceClassification as Auto
ids, found = torch.arange(1, 13).reshape(2, 6), {}
asked = json.loads(sys.argv[1])
def logits(model, **more):
    with torch.no_grad():
        return model.eval()(input_ids=ids, **more).logits.double().tolist()
for name, (base, adapter) in asked.items():
    model = PeftModel.from_pretrained(Auto.from_pretrained(base), adapter)
    found[name] = logits(model)
    found[name + " auto"] = logits(AutoPeftModelForSequenceClassification.from_pretrained(adapter))
    found[name + " merged"] = logits(model.merge_and_unload())
(base, one), (_, two) = asked["lora portable"], asked["prior portable"]
mixed = PeftModel.from_pretrained(Auto.from_pretrained(base), one, adapter_name="lora")
mixed.load_adapter(two, adapter_name="prior")
found["mixed"] = logits(mixed, adapter_names=["lora", "prior"])
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The base's folder, logits in memory, and adapters with the head folded in, by kind."""
    folder = tmp_path_factory.mktemp("head")
    base = tiny("bert", dropout=0.0).eval()
    base.save_pretrained(folder / "base")
    bt = BTLora(base, AdapterSettings(r_max=3))
    with torch.no_grad(), bt.off():
        plain = bt.model(input_ids=IDS).logits.double()
    logits = {"prior": plain + OFFSET}
    weights = {"prior": with_head(replace(no_ranks(bt), offset=OFFSET), bt)}
    bt.reset(random_lambda(bt))
    disturb(bt)
    with torch.no_grad():
        logits["lora"] = bt.model.eval()(input_ids=IDS).logits.double() + OFFSET
    weights["lora"] = with_head(replace(bt.trim(3), offset=OFFSET), bt)
    # logits divided by a temperature first (`calibrated-prior`)
    logits["calibrated"] = (logits["lora"] - OFFSET) / 2.5 + OFFSET
    weights["calibrated"] = with_head(replace(bt.trim(3), offset=OFFSET, temperature=2.5), bt)
    assert (weights["calibrated"].offset, weights["calibrated"].temperature) == (None, 1.0)
    assert (logits["lora"] - logits["prior"]).abs().max() > 0.01
    return folder, bt, logits, weights


@pytest.fixture(scope="module")
def elsewhere(made):
    """What plain PEFT makes of them in another process."""
    folder, bt, _, weights = made
    asked = {}
    for name, each in weights.items():
        for layout in ("portable", "compact"):
            adapter = folder / f"{name}-{layout}"
            save_adapter(
                each, adapter, base=str(folder / "base"), layout=layout,
                loads=auto_mapping(bt.model.get_base_model()),
            )  # fmt: skip
            asked[f"{name} {layout}"] = str(folder / "base"), str(adapter)
    return json.loads(plain_python(PLAIN_PEFT, json.dumps(asked)))


@pytest.mark.parametrize("name", ["prior", "lora"])
@pytest.mark.parametrize("layout", ["portable", "compact"])
@pytest.mark.parametrize("how", ["", " auto", " merged"])
def test_plain_peft_gives_the_same_logits(made, elsewhere, name, layout, how) -> None:
    got = torch.tensor(elsewhere[f"{name} {layout}{how}"]).double()
    assert torch.allclose(got, made[2][name], atol=1e-5, rtol=0)


def test_mixed_batches_take_each_rows_own_head(made, elsewhere) -> None:
    want = torch.stack([made[2]["lora"][0], made[2]["prior"][1]])
    assert torch.allclose(torch.tensor(elsewhere["mixed"]).double(), want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["prior", "lora"])
def test_reading_back_and_other_layouts(made, elsewhere, name) -> None:
    folder, _, _, weights = made
    read = load_adapter(folder / f"{name}-portable")
    assert torch.equal(read.head.weight, weights[name].head.weight)
    assert torch.equal(read.head.bias, weights[name].head.bias)
    save_adapter(read, folder / f"{name}-again", base="b", layout="compact")
    one, two = (
        load_file(folder / f"{name}-{x}/adapter_model.safetensors") for x in ("compact", "again")
    )
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], value) for key, value in two.items())


def test_a_prior_is_seven_numbers_or_as_many_as_classes(made) -> None:
    bt = made[1]
    assert replace(no_ranks(bt), offset=OFFSET).parameters() == CLASSES == 3
    assert replace(no_ranks(bt), offset=OFFSET, temperature=2.5).parameters() == CLASSES + 1
    assert no_ranks(bt).parameters() == 0


def test_a_head_without_a_bias_is_refused() -> None:
    bt = BTLora(tiny("llama"), AdapterSettings(r_max=2))
    classes = bt.linears[-1][1].out_features
    assert head_of(bt.linears, classes) is None
    with pytest.raises(UserError, match="head has no bias"):
        with_head(replace(no_ranks(bt), offset=torch.zeros(classes)), bt)
