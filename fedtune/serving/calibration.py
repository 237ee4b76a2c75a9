"""What goes into each product of an ONNX model, over calibration texts: the ranges that static int8 takes.

They are the least and the largest number of each column over all tokens of all texts, exactly and without
noise: a file that holds them tells of the texts, so these have to be public (`fedtune.export.checks` sees to
that).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedtune.models.onnx_files import Ranges, with_product_inputs
from fedtune.serving.classifier import BATCH_TOKENS, feed, onnx_session, padded, token_batches

__all__ = ["product_ranges"]


def product_ranges(
    path: Path, ids: Sequence[Sequence[int]], pad_id: int, threads: int = 0, separator: int | None = None
) -> Ranges:
    """The range of each column of each product's input, over the tokens `ids` of n texts.

    Args:
        path: of the float32 ONNX file.
        ids: token ids of each text; at least one text.
        pad_id: the token that fills up; what comes of it does not count.
        threads: of onnxruntime; 0: as many as there are cores.
        separator: as of `fedtune.serving.classifier.segments`.

    Raises:
        ModelError: onnxruntime cannot read the file.
    """
    model, names = with_product_inputs(path)
    session = onnx_session(model, path, threads)
    inputs = [one.name for one in session.get_inputs()]
    least: dict[str, NDArray[np.float32]] = {}
    largest: dict[str, NDArray[np.float32]] = {}
    for rows in token_batches([len(one) for one in ids], BATCH_TOKENS):
        tokens, mask = padded([ids[row] for row in rows], pad_id)
        for name, value in zip(
            names, session.run(names, feed(inputs, tokens, mask, {}, separator)), strict=True
        ):
            # [b, s, n] for a token's vector; the head's input [b, n] is a text's.
            some = value[mask.astype(bool)] if value.ndim == 3 else value
            bottom, top = some.min(axis=0), some.max(axis=0)
            least[name] = np.minimum(least.get(name, bottom), bottom)
            largest[name] = np.maximum(largest.get(name, top), top)
    return {name: (least[name], largest[name]) for name in names}
