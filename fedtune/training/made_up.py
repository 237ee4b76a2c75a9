"""Records of nobody, in the shape of a corpus': what the code is tried and counted with.

What is asked of private records is a release, even if the answer is only that it works: so whatever is not
charged by the mechanism is asked of these.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedtune.data.corpus import TokenizedCorpus, offsets_of
from fedtune.models.classifier import AdaptedModel
from fedtune.models.frozen_outputs import Features

__all__ = ["made_up"]


def made_up(model: AdaptedModel, lengths: Sequence[int], window: int | None = None) -> Features:
    """Records of n `lengths`, in tokens, with what the trained part of `model` takes for them.

    Tokens and, where lower layers are frozen, their outputs are drawn, always the same. `window`: as of a
    corpus.
    """
    encoder, chance, sizes = model.base.encoder, np.random.default_rng(0), np.asarray(lengths, dtype=np.int64)
    offsets, classes = offsets_of(sizes), model.base.num_labels
    special = {encoder.pad_token_id, encoder.separator}
    words = [token for token in range(encoder.config.vocab_size) if token not in special]
    few = chance.choice(words, 5)  # so that they recur within a text
    ids = chance.choice(few, int(offsets[-1])).astype(np.int32)
    if encoder.separator is not None:  # of pairs: the second begins in the middle
        ids[offsets[:-1] + sizes // 2] = encoder.separator
    corpus = TokenizedCorpus(
        name="made up",
        input_ids=ids,
        offsets=offsets,
        labels=np.arange(len(sizes), dtype=np.int64) % classes,
        label_names=tuple(map(str, range(classes))),
        units=None,
        sites=None,
        digests=np.zeros((len(sizes), 32), dtype=np.uint8),
        marks=np.zeros((len(sizes), 32), dtype=np.uint8),
        source="made up",
        pad_id=encoder.pad_token_id,
        window=window,
    )
    pooled, rows = model.first_layer == model.num_layers, None
    if model.first_layer > 0:
        kept = np.ones_like(sizes) if pooled else sizes
        shapes = [(tokens, encoder.width) for tokens in kept]
        rows = [chance.standard_normal(shape, np.float32).astype(np.float16) for shape in shapes]
    return Features(corpus, rows, pooled, encoder.width, model.first_layer)
