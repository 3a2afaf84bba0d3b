"""Where bf16 pays. GPUs compute it natively; a CPU without bf16 instructions emulates it, some ten times slower than fp32."""

import torch


def computes_bf16(device: torch.device) -> bool:
    """Whether the device has bf16 arithmetic of its own (on CPU: AVX512-BF16, AMX or ARM's BF16 instructions)."""
    if device.type != "cpu":
        return True
    return any(present is True for name, present in torch.cpu.get_capabilities().items() if "bf16" in name)


def uses_bf16(precision: str, device: torch.device) -> bool:
    """What a recipe's `precision` ("auto", "bf16" or "fp32") means on this device."""
    return computes_bf16(device) if precision == "auto" else precision == "bf16"
