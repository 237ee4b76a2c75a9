"""Which floating point type a processor multiplies fast.

bfloat16 is twice to five times as fast as float32 where the processor has instructions for it (AMX,
AVX512-BF16, ARM BF16, GPUs since 2020) and several times slower where it is emulated, so `auto` asks
the processor. The adapter, the gradients that are clipped, and the noise are float32 or float64 always.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

__all__ = ["autocast", "fast_bf16"]


@functools.cache
def fast_bf16(device_type: str) -> bool:
    """True if products in bfloat16 have hardware on this device."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type != "cpu":
        return False
    probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, probe)() for probe in probes if hasattr(torch.cpu, probe))


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """A context in which matrix products run in `precision` (`auto`, `fp32` or `bf16`)."""
    if precision == "bf16" or (precision == "auto" and fast_bf16(device.type)):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()
