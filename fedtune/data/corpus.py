"""What data is inside fedtune: a Corpus (text), a TokenizedCorpus (token ids), a Shard (one node's part).

All three are frozen and know nothing of files, tokenizers or nodes' budgets. Rows keep their order, so
that an index means the same record everywhere.

Fingerprints are how a privacy ledger knows data again, so they are of what a person would know again: the
texts. Order, labels, and which columns name persons and sites do not count, or shuffling a file or naming
another column would make it new data with a fresh budget. For the same reason every part of a corpus
remembers its `source`, the fingerprint of the whole before it was split and dealt out: with another seed or
partition a node gets other records, but of the same people.

That fingerprint and the digests are for caches and for ledgers of version 0.1. What a ledger is charged by
is a shard's `identity`: every record and person by itself (`fedtune.privacy.ledger.identity`).

Shapes: n records, t tokens in all.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from fedtune.data.sources.spellings import folded
from fedtune.privacy.ledger.identity import Identity, marks_of

__all__ = ["Corpus", "Shard", "TokenizedCorpus", "fingerprint_of", "offsets_of", "take_tokens"]

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
StrArray = npt.NDArray[np.str_]
ByteArray = npt.NDArray[np.uint8]


def fingerprint_of(digests: ByteArray) -> str:
    """The fingerprint of the records with these digests (uint8 [n, 32]), in any order: 64 hex digits.

    Repeated records count: a corpus with a record twice is another corpus than with it once.
    """
    total = hashlib.sha256(b"fedtune corpus 1")
    for digest in sorted(row.tobytes() for row in digests):
        total.update(digest)
    return total.hexdigest()


def _digest(parts: Iterable[str | None]) -> bytes:
    """SHA-256 of one record. Each part carries its length, so that no two records can run together."""
    record = hashlib.sha256()
    for part in parts:
        if part is None:
            record.update(b"-")
        else:
            data = part.encode("utf-8", "surrogatepass")
            record.update(b"%d:" % len(data))
            record.update(data)
    return record.digest()


def _take(array: npt.NDArray[Any] | None, indices: Int64Array) -> Any:
    return None if array is None else array[indices]


def offsets_of(lengths: npt.NDArray[np.integer[Any]]) -> Int64Array:
    """Lengths [n] -> where each record starts and the last one ends, int64 [n + 1]."""
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def take_tokens(
    input_ids: Int32Array, offsets: Int64Array, rows: Int64Array
) -> tuple[Int32Array, Int64Array]:
    """The token ids and offsets of the records at `rows`, copied, from those of all."""
    lengths = np.diff(offsets)[rows]
    ends = offsets_of(lengths)
    # Position of every taken token in the source: its record's start plus its place in the record.
    source = np.repeat(offsets[rows] - ends[:-1], lengths) + np.arange(ends[-1])
    return np.asarray(input_ids[source], dtype=np.int32), ends


def _codes(units: StrArray | None, num_records: int) -> tuple[Int64Array, int]:
    if units is None:
        return np.arange(num_records, dtype=np.int64), num_records
    names, codes = np.unique(units, return_inverse=True)
    return codes.astype(np.int64), len(names)


def _identity(marks: ByteArray, units: StrArray | None, source: str) -> Identity:
    """Records by their `marks` [n, k, 32] and persons by their names [n], as a ledger takes them; private.

    Which spelling stands for a person follows from the file, so each is known by what all share, too.
    """
    names = None if units is None else np.unique(units).tolist()
    persons = None if names is None else [*names, *map(folded, names)]
    return Identity(marks.reshape(-1, 32), persons, source)


@dataclass(frozen=True, eq=False)
class Corpus:
    """One split of a data set, as text.

    Attributes:
        name: what the ledger calls this data.
        texts: n texts.
        pairs: n second texts, where records are sentence pairs.
        labels: int64 [n], indices into `label_names`.
        label_names: the label set, which is public.
        units: str [n], the person that each record belongs to, where the data names persons.
        sites: str [n], the site that each record comes from, where the data names sites.
        notes: what was decided while loading and must not go unsaid (dropped records, a label set taken
            from the data).
        source: the fingerprint of the corpus that this is a part of; '' if it is whole.
        part_of: that corpus, and the rows int64 [n] of it that these are, so that nothing is hashed or
            tokenised again for another split.
    """

    name: str
    texts: tuple[str, ...]
    pairs: tuple[str, ...] | None
    labels: Int64Array
    label_names: tuple[str, ...]
    units: StrArray | None = None
    sites: StrArray | None = None
    notes: tuple[str, ...] = ()
    source: str = ""
    part_of: tuple[Corpus, Int64Array] | None = None

    def __post_init__(self) -> None:
        for field in ("pairs", "labels", "units", "sites"):
            column = getattr(self, field)
            if column is not None and len(column) != len(self.texts):
                raise ValueError(f"{field} has {len(column)} entries for {len(self.texts)} texts")
        if self.part_of is not None:
            whole, rows = self.part_of
            # Its digests are taken from the whole's: other texts would go by the fingerprint of these.
            for mine, theirs in ((self.texts, whole.texts), (self.pairs, whole.pairs)):
                if mine is None and theirs is None:
                    continue
                taken = () if theirs is None else [theirs[row] for row in rows]
                if len(taken) != len(mine or ()) or any(map(operator.is_not, mine or (), taken)):
                    raise ValueError("the texts or pairs are not those rows of part_of")

    @property
    def num_records(self) -> int:
        return len(self.texts)

    def subset(self, indices: npt.ArrayLike) -> Corpus:
        """The records at `indices` (integers), in that order."""
        rows = np.asarray(indices, dtype=np.int64)
        whole, place = self.part_of or (self, np.arange(self.num_records))
        return Corpus(
            name=self.name,
            texts=tuple(self.texts[i] for i in rows),
            pairs=None if self.pairs is None else tuple(self.pairs[i] for i in rows),
            labels=self.labels[rows],
            label_names=self.label_names,
            units=_take(self.units, rows),
            sites=_take(self.sites, rows),
            notes=self.notes,
            source=self.source or self.fingerprint(),
            part_of=(whole, place[rows]),
        )

    @cached_property
    def digests(self) -> ByteArray:
        """SHA-256 of each record's text and pair: uint8 [n, 32], in record order.

        A hash of a short text can be guessed back, so digests are as private as the texts.
        """
        if self.part_of is not None:
            whole, rows = self.part_of
            return whole.digests[rows]
        pairs = self.pairs or (None,) * len(self.texts)
        joined = b"".join(_digest(record) for record in zip(self.texts, pairs, strict=True))
        return np.frombuffer(joined, dtype=np.uint8).reshape(-1, 32)

    @cached_property
    def marks(self) -> ByteArray:
        """What a ledger knows each record by, before it is keyed: uint8 [n, k, 32], in their order; private.

        Unlike `digests` they are of normalised texts (`privacy.ledger.identity.marks_of`).
        """
        if self.part_of is not None:
            whole, rows = self.part_of
            return whole.marks[rows]
        return marks_of(self.texts, self.pairs)

    @property
    def identity(self) -> Identity:
        """As `TokenizedCorpus.identity`."""
        return _identity(self.marks, self.units, self.source or self.fingerprint())

    def fingerprint(self) -> str:
        """SHA-256 over the sorted texts; order, labels, persons, sites and name do not count."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint_of(self.digests)


@dataclass(frozen=True, eq=False)
class TokenizedCorpus:
    """One split of a data set, as token ids: ragged, so nothing is padded before a batch is known.

    Segment ids are not stored: the encoder knows a pair's second text by the separator.

    Attributes:
        input_ids: int32 [t], special tokens included, each record cut to a public length; may be
            memory-mapped and read-only.
        offsets: int64 [n + 1]; record i is `input_ids[offsets[i]:offsets[i + 1]]`.
        digests: uint8 [n, 32], private, as in `Corpus`; so are `marks`, uint8 [n, k, 32] or [n, 32].
        source: the fingerprint of the whole corpus.
        pad_id: the tokenizer's padding token.
        window: tokens of a window at most, where a record may have several (`fedtune.data.windows`); None:
            each record is one piece.

    The others are as in `Corpus`.
    """

    name: str
    input_ids: Int32Array
    offsets: Int64Array
    labels: Int64Array
    label_names: tuple[str, ...]
    units: StrArray | None
    sites: StrArray | None
    digests: ByteArray
    marks: ByteArray
    source: str
    pad_id: int = 0
    window: int | None = None

    def __post_init__(self) -> None:
        if len(self.offsets) != len(self.labels) + 1 or self.offsets[-1] != len(self.input_ids):
            raise ValueError(
                f"offsets [{len(self.offsets)}] do not fit {len(self.labels)} records of "
                f"{len(self.input_ids)} tokens"
            )

    @property
    def num_records(self) -> int:
        return len(self.labels)

    @cached_property
    def lengths(self) -> Int64Array:
        """Tokens of each record: int64 [n]."""
        return np.diff(self.offsets)

    @cached_property
    def fingerprint(self) -> str:
        """As `Corpus.fingerprint`, of these records: whatever the tokenizer."""
        return fingerprint_of(self.digests)

    @cached_property
    def _unit_codes(self) -> tuple[Int64Array, int]:
        return _codes(self.units, self.num_records)

    @property
    def unit_index(self) -> Int64Array:
        """The person of each record as a number in [0, num_units): int64 [n]. Without `units`, each
        record is its own person. Numbers follow the sorted names of the persons."""
        return self._unit_codes[0]

    @property
    def num_units(self) -> int:
        """Persons in this data; private, unlike a Shard's declared size."""
        return self._unit_codes[1]

    @cached_property
    def identity(self) -> Identity:
        """The records and persons in this data, as a ledger takes them; private."""
        return _identity(self.marks, self.units, self.source)

    def tokens(self, index: int) -> Int32Array:
        """Token ids of one record, int32 [its length], without a copy: what a test compares with."""
        return self.input_ids[self.offsets[index] : self.offsets[index + 1]]

    def subset(self, indices: npt.ArrayLike) -> TokenizedCorpus:
        """The records at `indices` (integers), in that order; the tokens are copied."""
        rows = np.asarray(indices, dtype=np.int64)
        input_ids, offsets = take_tokens(self.input_ids, self.offsets, rows)
        return TokenizedCorpus(
            name=self.name,
            input_ids=input_ids,
            offsets=offsets,
            labels=self.labels[rows],
            label_names=self.label_names,
            units=_take(self.units, rows),
            sites=_take(self.sites, rows),
            digests=self.digests[rows],
            marks=self.marks[rows],
            source=self.source,
            pad_id=self.pad_id,
            window=self.window,
        )


@dataclass(frozen=True, eq=False)
class Shard:
    """One node's private part of a corpus.

    Guarantee: shards made together are disjoint in records, so a federation's epsilon is the
    maximum over its nodes; for `unit=person` they are disjoint in persons too.

    Attributes:
        node: its name.
        data: private.
        declared_size: PUBLIC, in units of the plan (persons for `unit=person`, else records). Its owner
            declares it, because the expected batch size and delta are computed from it, and a size counted
            from the data would be a release (see `partition`).
        fingerprint: of the whole source, private: for caches and ledgers of version 0.1.
        dataset: the name of its data set.
        record_index: int64 [n], the row of each record in the train corpus that it was cut from.
        whole: the data of the shard that this is a part of (None: it is whole), so that what is trained on
            and what is held out are charged together.
    """

    node: str
    data: TokenizedCorpus
    declared_size: int
    fingerprint: str
    dataset: str
    record_index: Int64Array
    whole: TokenizedCorpus | None = None

    @property
    def identity(self) -> Identity:
        """Whose data a release from this shard touches: all of it, its held-out part included. Private."""
        return (self.data if self.whole is None else self.whole).identity
