"""The dtype of the frozen base model."""

from typing import Literal

import torch

from fedp2eft.errors import UserError

Precision = Literal["auto", "fp32", "bf16"]
# Instructions that multiply bf16 in hardware; without them bf16 is emulated and slower than fp32.
_CPU_BF16 = ("avx512_bf16", "amx_bf16")


def resolve_precision(name: Precision, device: torch.device | str) -> torch.dtype:
    """Return the dtype for the base model on `device`.

    Args:
        name: `"fp32"`, `"bf16"`, or `"auto"`: bf16 where the device multiplies it in hardware (a
            CPU with AVX512_BF16 or AMX, an NVIDIA GPU from Ampere on, a ROCm GPU), else fp32.
        device: where the model will run, like `"cpu"` or `"cuda:1"`.

    Raises:
        UserError: another name, or a CUDA device where torch sees none.
    """
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"Device {device}: torch sees no CUDA GPU here; use cpu.")
    if name == "fp32":
        return torch.float32
    if name == "bf16":
        return torch.bfloat16
    if name != "auto":
        raise UserError(f"Precision {name!r} is unknown: use auto, fp32 or bf16.")
    return torch.bfloat16 if _multiplies_bf16(device) else torch.float32


def _multiplies_bf16(device: torch.device) -> bool:
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(flag, False) for flag in _CPU_BF16)
    if device.type == "cuda":
        with torch.cuda.device(device):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return False


def choose_device(name: str) -> torch.device:
    """Return the torch device of a setting: "auto" is the GPU, if there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"Device {name!r} is unknown: use auto, cpu or cuda.") from error
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"Device {name!r} is unknown: use auto, cpu or cuda.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"Device {name} is asked for, but torch sees {torch.cuda.device_count()} GPUs: use "
            "another number, auto or cpu."
        )
    return device
