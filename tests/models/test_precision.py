import pytest
import torch

from fedp2eft.errors import UserError
from fedp2eft.models.precision import resolve_precision


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx2": True}, torch.float32),
        ({"avx512_f": True, "avx512_bf16": False}, torch.float32),
        ({"avx512_f": True, "avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
        ({}, torch.float32),
    ],
)
def test_auto_asks_the_cpu(capabilities, expected, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert resolve_precision("auto", "cpu") is expected
    assert resolve_precision("fp32", "cpu") is torch.float32
    assert resolve_precision("bf16", torch.device("cpu")) is torch.bfloat16


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_auto_asks_the_gpu() -> None:
    major, _ = torch.cuda.get_device_capability(0)
    expected = torch.bfloat16 if major >= 8 or torch.version.hip else torch.float32
    assert resolve_precision("auto", "cuda:0") is expected


def test_auto_on_other_devices_is_fp32() -> None:
    assert resolve_precision("auto", "meta") is torch.float32


def test_mistakes_are_user_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="use auto, fp32 or bf16"):
        resolve_precision("fp16", "cpu")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no CUDA GPU"):
        resolve_precision("auto", "cuda")
