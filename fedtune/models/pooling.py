"""From vectors of windows to those of texts (`fedtune.data.windows`)."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["of_texts"]


def of_texts(pooled: Tensor, text_of: Tensor | None) -> Tensor:
    """Vectors of windows [b, d] -> of texts [b, d], the mean of each one's; `text_of` [b] says whose a window
    is, None that each is a text. Places with no window are zero."""
    if text_of is None:
        return pooled
    counts = torch.zeros(len(pooled), dtype=pooled.dtype, device=pooled.device)
    counts.index_add_(0, text_of, torch.ones_like(counts))
    sums = torch.zeros_like(pooled).index_add(0, text_of, pooled)
    return sums / counts.clamp(min=1.0)[:, None]
