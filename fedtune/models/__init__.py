"""The model: a frozen, quantized BERT-family encoder, and the small adapter that is trained.

Only this package knows transformers, peft and bitsandbytes. Start at `fedtune.models.classifier`.
"""

from __future__ import annotations

import logging

__all__ = ["quiet_kernels"]


def quiet_kernels() -> None:
    """Keeps libraries from saying which kernels of other machines they could not load.

    torchao says it at every import, torch that torchao registers enums in an old way, bitsandbytes at its
    first product. None of it matters here.
    """
    for logger in ("torchao", "torch.utils._pytree", "bitsandbytes"):
        logging.getLogger(logger).setLevel(logging.ERROR)
