"""Outputs of the frozen lower layers, computed once a text and cached on disk.

Below the lowest adapted layer the encoder never changes and has no dropout, so its output for a text
is a constant. With an adapter on the top 2 of 6 layers this removes two thirds of the forward pass from
every step and every evaluation after the first; with `adapter=head` nothing of the encoder is left.

The store is addressed by content: one folder for a frozen part of an encoder, in it the outputs of
every text that ever went through it, found by the hash of its token ids. So another seed, split,
partition or run computes nothing again. What was computed in bfloat16 (relative 1e-2, where int8 weights are
4e-2 off) has a folder of its own. Values are float16: its rounding (relative 5e-4) is far below that of
quantized weights, and halves the file. The files are as private as the texts: they stay in the
cache folder of the node and are readable by their owner only.

Crash safety: values are appended and flushed before the index entries that name them, under a lock;
whatever a killed process left behind the last whole entry is ignored and overwritten.

What it does not do: anything for an adapter on all layers, whose lowest frozen part is the embedding
lookup; tokens are then looked up each time.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import logging
import os
import shutil
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedtune.config.files import cache_dir, lock_file
from fedtune.data.batches import MicroBatch, micro_batches, pad
from fedtune.data.corpus import TokenizedCorpus
from fedtune.data.windows import Windows
from fedtune.errors import ResourceError
from fedtune.models.classifier import AdaptedModel
from fedtune.models.encoder import autocast, computes_in
from fedtune.models.merged_layers import MergedLayers
from fedtune.models.pooling import of_texts

__all__ = ["FeatureStore", "Features", "Progress"]

_log = logging.getLogger(__name__)
_ENTRY = np.dtype([("digest", "<u8", 2), ("start", "<i8"), ("length", "<i8")])
_GIGABYTE = 1 << 30  # what a run leaves free on the disk: its ledger and checkpoints are there too
_FLUSH_TOKENS = 1 << 16  # at most a minute's work is lost when a process is killed

Progress = Callable[[int, int], None]  # (texts done, texts to do)


def _digests(corpus: TokenizedCorpus) -> list[bytes]:
    """Of each record's tokens, and of how they are cut, where it has several windows."""
    ids, offsets = np.ascontiguousarray(corpus.input_ids), corpus.offsets
    most = corpus.window or 0
    return [
        hashlib.blake2b(
            ids[a:b].tobytes(), digest_size=16, person=b"%d" % most if 0 < most < b - a else b""
        ).digest()
        for a, b in itertools.pairwise(offsets)
    ]


class FeatureStore:
    """Rows of float16 [*, width] by the digest of what they were computed from.

    Where the folder cannot be written (no space, no permission) new rows are kept in memory for the
    life of the process, and one warning says so.
    """

    def __init__(self, folder: Path, width: int) -> None:
        self.folder, self.width = folder, width
        self._where: dict[bytes, tuple[int, int]] = {}
        self._mapped = np.zeros((0, width), dtype=np.float16)
        self._entries_read = 0
        self._memory: list[NDArray[np.float16]] = []
        self._reload()

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._where

    def rows(self, digest: bytes) -> NDArray[np.float16]:
        """The rows [length, width] under `digest`; KeyError if there are none."""
        start, length = self._where[digest]
        return self._memory[-start - 1] if start < 0 else self._mapped[start : start + length]

    def add(self, items: list[tuple[bytes, NDArray[np.float16]]]) -> None:
        """Stores rows, durably where that is possible."""
        if not self._memory:
            try:
                self._append(items)
                return
            except OSError as error:
                _log.warning(
                    "The cache of frozen-layer outputs in %s cannot be written (%s); they are kept in memory "
                    "for this run only. Free some space, or set FEDTUNE_HOME to another disk.",
                    self.folder,
                    error.strerror or error,
                )
        for digest, rows in items:
            self._memory.append(rows)
            self._where[digest] = (-len(self._memory), len(rows))

    def _append(self, items: list[tuple[bytes, NDArray[np.float16]]]) -> None:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        opener = lambda path, flags: os.open(path, flags | os.O_CREAT, 0o600)  # noqa: E731
        with (
            lock_file(self.folder / "lock"),
            open(self.folder / "index.bin", "r+b", opener=opener) as index,
            open(self.folder / "values.f16", "r+b", opener=opener) as values,
        ):
            known = self._read_entries()
            end = int((known["start"] + known["length"]).max(initial=0))
            fresh = np.zeros(len(items), dtype=_ENTRY)
            values.seek(2 * self.width * end)
            before = end
            for entry, (digest, rows) in zip(fresh, items, strict=True):
                entry["digest"], entry["start"], entry["length"] = (
                    np.frombuffer(digest, "<u8"),
                    end,
                    len(rows),
                )
                end += len(rows)
            try:
                for _, rows in items:
                    values.write(np.ascontiguousarray(rows, dtype=np.float16).tobytes())
                values.flush()
                os.fsync(values.fileno())
            except OSError:
                os.truncate(values.fileno(), 2 * self.width * before)  # gives a full disk back what it took
                raise
            index.seek(_ENTRY.itemsize * len(known))
            index.write(fresh.tobytes())
            index.truncate()
            index.flush()
            os.fsync(index.fileno())
        self._reload()

    def _read_entries(self) -> NDArray[Any]:
        """Index entries up to the first that names rows which are not there."""
        try:
            raw = (self.folder / "index.bin").read_bytes()
            available = (self.folder / "values.f16").stat().st_size // (2 * self.width)
        except OSError:
            return np.zeros(0, dtype=_ENTRY)
        entries = np.frombuffer(raw[: len(raw) - len(raw) % _ENTRY.itemsize], dtype=_ENTRY)
        whole = (entries["start"] >= 0) & (entries["length"] > 0) & (entries["length"] <= available)
        whole &= entries["start"] <= available - entries["length"]
        count = len(entries) if whole.all() else int(np.argmin(whole))
        if count < len(entries):
            _log.warning(
                "The cache in %s is damaged after %d texts; the rest is computed anew.", self.folder, count
            )
        return entries[:count]

    def _reload(self) -> None:
        entries = self._read_entries()
        if not len(entries):
            return
        rows = int((entries["start"] + entries["length"]).max())
        self._mapped = np.memmap(
            self.folder / "values.f16", dtype=np.float16, mode="r", shape=(rows, self.width)
        )
        for entry in entries[self._entries_read :]:
            self._where[entry["digest"].tobytes()] = (int(entry["start"]), int(entry["length"]))
        self._entries_read = len(entries)


@dataclass(frozen=True, eq=False)
class Features:
    """What the trained part of a model takes for the texts of one corpus.

    `rows` is None (tokens are looked up each time) or holds, for each record, float16 [tokens, d] (the
    input of layer `model.first_layer`) or, for a bare head, the pooled float16 [1, d].
    """

    corpus: TokenizedCorpus
    rows: list[NDArray[np.float16]] | None
    pooled: bool
    width: int
    first_layer: int

    @classmethod
    def of(
        cls,
        model: AdaptedModel,
        corpus: TokenizedCorpus,
        micro_batch_tokens: int,
        progress: Progress | None = None,
        *,
        precision: str = "auto",
    ) -> Features:
        """The features of `corpus`, from the store; those that it lacks are computed and stored first.

        `precision` as `train.precision`.

        Raises:
            ResourceError: they are gigabytes that neither the disk nor, instead, memory should take.
        """
        width, pooled = model.base.encoder.width, model.first_layer == model.num_layers
        if model.first_layer == 0:
            return cls(corpus, None, False, width, 0)
        precision = computes_in(model.device, precision)
        part = f"{model.frozen_digest}|{model.first_layer}|{pooled}"
        part += "" if precision == "fp32" else f"|{precision}"
        key = hashlib.sha256(part.encode()).hexdigest()[:32]
        resident = _RESIDENT.get(corpus)
        if resident is not None and resident[0] == key:
            return resident[1]
        store = _STORES.get(key)
        if store is None:
            store = _STORES[key] = FeatureStore(cache_dir() / "frozen_layers" / key, width)
        digests = _digests(corpus)
        missing = np.array([i for i, digest in enumerate(digests) if digest not in store], dtype=np.int64)
        _check_space(store.folder, 2 * width * int(len(missing) if pooled else corpus.lengths[missing].sum()))
        _compute(store, model, corpus, missing, digests, pooled, micro_batch_tokens, progress, precision)
        features = cls(corpus, [store.rows(digest) for digest in digests], pooled, width, model.first_layer)
        _RESIDENT[corpus] = (key, features)
        return features

    def vectors(self, records: NDArray[np.int64]) -> NDArray[np.float16]:
        """The pooled vectors of `records` [r], [r, d]."""
        return self._vectors[records]

    @functools.cached_property
    def _vectors(self) -> NDArray[np.float16]:
        """The pooled vectors of all records, [n, d], in one place."""
        rows = self.rows or []
        return np.concatenate(rows) if rows else np.zeros((0, self.width), dtype=np.float16)

    @functools.cached_property
    def _windows(self) -> Windows | None:
        return None if self.pooled else Windows.of(self.corpus)

    def batches(self, records: NDArray[np.int64], most_tokens: int) -> list[MicroBatch]:
        """`records` [r] of the corpus in micro-batches, whose own `records` are places among these; a
        pooled text counts as one token, and all windows of a text are in one micro-batch."""
        if self.pooled:
            return micro_batches(np.ones(len(records), dtype=np.int64), most_tokens)
        return _batches(self.corpus, self._windows, records, most_tokens)

    def shape(self, records: NDArray[np.int64]) -> tuple[int, int]:
        """Rows and tokens that `inputs` needs for `records` in one micro-batch."""
        if self.pooled:
            return len(records), 1
        rows, lengths = records, self.corpus.lengths
        if self._windows is not None:
            rows, lengths = self._windows.of_records(records)[0], self._windows.lengths
        return len(rows), int(-(-lengths[rows].max() // 8) * 8)

    def inputs(
        self, records: NDArray[np.int64], rows: int, length: int, device: torch.device
    ) -> dict[str, Any]:
        """Arguments of `EncoderClassifier.forward` for `records` [r] of the corpus, in a batch of `rows`
        rows of `length` tokens; of its logits [rows, c] those after the first r are dummies'."""
        if self.pooled and self.rows is not None:
            features = np.zeros((rows, self.width), dtype=np.float32)
            features[: len(records)] = self._vectors[records]
            return {"pooled": torch.from_numpy(features).to(device)}
        ids, mask, text_of = _grid(self.corpus, self._windows, records, rows, length)
        arguments: dict[str, Any] = {"attention_mask": torch.from_numpy(mask).to(device)}
        if text_of is not None:
            arguments["text_of"] = torch.from_numpy(text_of).to(device)
        if self.rows is None:
            return {"input_ids": torch.from_numpy(ids).to(device), **arguments}
        hidden = np.zeros((rows, length, self.width), dtype=np.float32)
        filled = mask.copy()
        used = len(records) if text_of is None else int((text_of < len(records)).sum())
        filled[used:] = False  # dummies
        if used:
            hidden[filled] = np.concatenate([self.rows[record] for record in records])
        return {"hidden": torch.from_numpy(hidden).to(device), **arguments, "first_layer": self.first_layer}


def _batches(
    corpus: TokenizedCorpus, windows: Windows | None, records: NDArray[np.int64], most_tokens: int
) -> list[MicroBatch]:
    if windows is None:
        return micro_batches(corpus.lengths[records], most_tokens)
    rows, text_of = windows.of_records(records)
    return [
        MicroBatch(np.unique(text_of[batch.records]), batch.rows, batch.length)
        for batch in micro_batches(windows.lengths[rows], most_tokens, text_of)
    ]


def _grid(
    corpus: TokenizedCorpus, windows: Windows | None, records: NDArray[np.int64], rows: int, length: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.int64] | None]:
    """Token ids and mask [rows, length] of `records` [r], or of their windows; and for these which of the
    records each row is of, r for dummies, int64 [rows]."""
    if windows is None:
        return *pad(corpus, records, length, rows), None
    wanted, whose = windows.of_records(records)
    text_of = np.full(rows, len(records), dtype=np.int64)
    text_of[: len(whose)] = whose
    return *pad(windows, wanted, length, rows), text_of


_STORES: dict[str, FeatureStore] = {}
_RESIDENT: weakref.WeakKeyDictionary[TokenizedCorpus, tuple[str, Features]] = weakref.WeakKeyDictionary()


def _check_space(folder: Path, needed: int) -> None:
    """Raises ResourceError if `needed` bytes are over a gigabyte and would leave the disk less than one."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > _GIGABYTE and needed > free - _GIGABYTE:
        raise ResourceError(
            f"The outputs of the frozen layers for all texts would take {needed / 1e9:.1f} GB in {folder}, "
            f"where {free / 1e9:.1f} GB are free. adapter=head needs a row a text and no more; with "
            "adapter.layers=null nothing is kept; or lower data.max_length, or let FEDTUNE_HOME name a "
            "folder on a larger disk."
        )


@torch.no_grad()
def _compute(
    store: FeatureStore,
    model: AdaptedModel,
    corpus: TokenizedCorpus,
    missing: NDArray[np.int64],
    digests: list[bytes],
    pooled: bool,
    tokens: int,
    progress: Progress | None,
    precision: str,
) -> None:
    encoder, windows = model.base.encoder, Windows.of(corpus)
    done, waiting, items = 0, 0, dict[bytes, NDArray[np.float16]]()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    layers = MergedLayers.of(encoder, 0, model.first_layer, dtype) if len(missing) else None

    def work(batch: MicroBatch) -> tuple[MicroBatch, NDArray[np.float16]]:
        ids, mask, text_of = _grid(corpus, windows, missing[batch.records], batch.rows, batch.length)
        on_device = torch.from_numpy(mask).to(model.device)
        with model.flops.counting(("frozen", *batch.shape)):
            hidden = encoder.embed(torch.from_numpy(ids).to(model.device), on_device)
            if layers is not None:
                hidden = layers.run(hidden, on_device)
            else:
                with autocast(model.device, precision):
                    hidden = encoder.run(hidden, on_device, 0, model.first_layer).float()
        if pooled:
            whose = None if text_of is None else torch.from_numpy(text_of).to(model.device)
            output = of_texts(model.base.pool(hidden, on_device), whose)[: len(batch.records)]
        else:  # the tokens of all rows one after the other, dummies last
            output = hidden[on_device]
        return batch, output.cpu().numpy().astype(np.float16)

    for batch, kept in model.each("frozen", work, _batches(corpus, windows, missing, tokens), layers):
        records, start = missing[batch.records], 0
        for record in records:
            stop = start + (1 if pooled else int(corpus.lengths[record]))
            items[digests[record]] = kept[start:stop].copy()
            start = stop
        waiting += batch.rows * batch.length
        done += len(records)
        if waiting > _FLUSH_TOKENS:
            store.add(list(items.items()))
            waiting, items = 0, {}
        if progress is not None:
            progress(done, len(missing))
    if items:
        store.add(list(items.items()))
