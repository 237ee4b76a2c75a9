"""Corpus -> TokenizedCorpus, once: token ids are kept on disk and memory-mapped afterwards.

One file for each (content in its order, tokenizer, max_length, windows) in `cache_dir()/tokens`: the records'
lengths, then their token ids. `fedtune.data.array_cache` says what happens when such a file is damaged or
cannot be written.

What it does not do: learn anything from the texts. The tokenizer is the encoder's own and `max_length`
is a public setting, as how many windows a long text has; none is ever derived from private data.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from fedtune.data.array_cache import load_array, store_array, warn_unusable
from fedtune.data.corpus import Corpus, Int32Array, TokenizedCorpus, offsets_of, take_tokens
from fedtune.data.windows import in_windows
from fedtune.errors import DataError

__all__ = ["encoded", "special_tokens", "tokenize"]

CHUNK = 4096  # texts handed to the tokenizer at once; bounds memory, not speed


def tokenize(
    corpus: Corpus, tokenizer: Any, tokenizer_id: str, max_length: int, windows: int = 1
) -> TokenizedCorpus:
    """Token ids of every record, with special tokens, cut to `windows` pieces of `max_length` tokens.

    Args:
        corpus: what is tokenised.
        tokenizer: a (fast) Hugging Face tokenizer.
        tokenizer_id: a string that changes whenever the tokenizer's output may.
        max_length: in tokens, special tokens included.
        windows: how many pieces a text has at most (`fedtune.data.windows`); of pairs, one.

    Raises:
        DataError: `max_length` leaves no room for text, or is more than the encoder has positions for.
    """
    special = int(tokenizer.num_special_tokens_to_add(pair=corpus.pairs is not None))
    limit = int(getattr(tokenizer, "model_max_length", max_length) or max_length)
    if not special < max_length <= limit:
        raise DataError(
            f"data.max_length is {max_length}; the model's tokenizer takes from {special + 1} "
            f"to {limit} tokens, {special} of them special. Set data.max_length in that range."
        )
    lengths, input_ids = _tokens(corpus, tokenizer, tokenizer_id, max_length, windows)
    return TokenizedCorpus(
        name=corpus.name,
        input_ids=input_ids,
        offsets=offsets_of(lengths),
        labels=corpus.labels,
        label_names=corpus.label_names,
        units=corpus.units,
        sites=corpus.sites,
        digests=corpus.digests,
        marks=corpus.marks,
        source=corpus.source or corpus.fingerprint(),
        pad_id=int(getattr(tokenizer, "pad_token_id", 0) or 0),
        window=max_length if windows > 1 else None,
    )


def _tokens(
    corpus: Corpus, tokenizer: Any, tokenizer_id: str, max_length: int, windows: int
) -> tuple[Int32Array, Int32Array]:
    """Lengths [n] and token ids [t]: from the cache, from the whole that this is a part of, or new."""
    path = _cache_path(corpus, tokenizer_id, max_length, windows)
    cached = _read(path, corpus.num_records)
    if cached is None:
        if corpus.part_of is None:
            cached = _encode(corpus, tokenizer, max_length, windows)
        else:
            whole, rows = corpus.part_of
            lengths, input_ids = _tokens(whole, tokenizer, tokenizer_id, max_length, windows)
            cached = lengths[rows], take_tokens(input_ids, offsets_of(lengths), rows)[0]
        if store_array(path, np.concatenate(cached)):
            # Mapped like in every later process, so that memory is the same however a run began.
            cached = _read(path, corpus.num_records) or cached
    return cached


def encoded(
    tokenizer: Any, texts: list[str], pairs: list[str] | None, max_length: int, windows: int = 1
) -> list[list[int]]:
    """Token ids of texts, as `tokenize` makes them: of a text of several windows, one after the other."""
    special = int(tokenizer.num_special_tokens_to_add(pair=pairs is not None))
    ids: list[list[int]] = tokenizer(
        texts,
        pairs,
        truncation=True,
        max_length=windows * (max_length - special) + special,
        padding=False,
        return_attention_mask=False,
        return_token_type_ids=False,
    )["input_ids"]
    if windows == 1 or all(len(one) <= max_length for one in ids):
        return ids
    before, after = special_tokens(tokenizer)
    return [in_windows(one, before, after, max_length) for one in ids]


def special_tokens(tokenizer: Any) -> tuple[int, int]:
    """How many special tokens stand before a text, and how many after it."""
    options = {"truncation": True, "max_length": 8}
    (whole,) = tokenizer(["a"], None, **options)["input_ids"]
    (bare,) = tokenizer(["a"], None, **options, add_special_tokens=False)["input_ids"]
    before = next(i for i in range(len(whole)) if list(whole[i : i + len(bare)]) == list(bare))
    return before, len(whole) - len(bare) - before


def _encode(corpus: Corpus, tokenizer: Any, max_length: int, windows: int) -> tuple[Int32Array, Int32Array]:
    lengths: list[int] = []
    pieces: list[Int32Array] = []
    for start in range(0, corpus.num_records, CHUNK):
        stop = start + CHUNK
        pairs = None if corpus.pairs is None else list(corpus.pairs[start:stop])
        found = encoded(tokenizer, list(corpus.texts[start:stop]), pairs, max_length, windows)
        lengths += [len(ids) for ids in found]
        pieces.append(np.fromiter((i for ids in found for i in ids), dtype=np.int32))
    flat = np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int32)
    return np.array(lengths, dtype=np.int32), flat


def _cache_path(corpus: Corpus, tokenizer_id: str, max_length: int, windows: int) -> Path:
    from fedtune.config.files import cache_dir

    # Digests in record order: a fingerprint would not do, since equal content may lie in another order.
    key = hashlib.sha256(corpus.digests.tobytes())
    key.update(f"|{tokenizer_id}|{max_length}|{corpus.pairs is not None}".encode())
    if windows > 1:
        key.update(f"|{windows} windows".encode())
    return cache_dir() / "tokens" / f"{key.hexdigest()[:40]}.npy"


def _read(path: Path, num_records: int) -> tuple[Int32Array, Int32Array] | None:
    """Lengths [n] and token ids [t], mapped; None if they are not there or not these records'."""
    stored = load_array(path)
    if stored is None:
        return None
    lengths, input_ids = stored[:num_records], stored[num_records:]
    if len(lengths) != num_records or lengths.sum(dtype=np.int64) != len(input_ids):
        warn_unusable(path, f"it does not hold {num_records} records")
        return None
    return lengths, input_ids
