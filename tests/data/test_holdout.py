"""Who is held out for evaluation: by unit, the same ones always, and nobody on both sides."""

from __future__ import annotations

import numpy as np
import pytest

from fedtune.data.corpus import Corpus, Shard, TokenizedCorpus
from fedtune.data.holdout import hold_out, is_held_out


def shard_of(texts: list[str], units: list[str] | None, declared_size: int = 1000) -> Shard:
    corpus = Corpus(
        name="made-up",
        texts=tuple(texts),
        pairs=None,
        labels=np.arange(len(texts)) % 2,
        label_names=("a", "b"),
        units=None if units is None else np.array(units, dtype=np.str_),
    )
    n = len(texts)
    data = TokenizedCorpus(
        name=corpus.name, input_ids=np.arange(n, dtype=np.int32), offsets=np.arange(n + 1),
        labels=corpus.labels, label_names=corpus.label_names, units=corpus.units, sites=None,
        digests=corpus.digests, marks=corpus.marks, source=corpus.fingerprint(),
    )  # fmt: skip
    return Shard("clinic", data, declared_size, data.source, "made-up", np.arange(n, dtype=np.int64))


TEXTS = [f"text {i}" for i in range(2000)]
PERSONS = [f"person {i // 4}" for i in range(2000)]


@pytest.mark.parametrize("units", [None, PERSONS])
def test_about_the_share_is_held_out_and_every_record_is_in_one_part(units: list[str] | None) -> None:
    shard = shard_of(TEXTS, units)
    train, test = hold_out(shard, 0.2)
    rows = np.concatenate([train.record_index, test.record_index])
    assert np.array_equal(np.sort(rows), np.arange(2000))
    assert abs(test.data.num_records / 2000 - 0.2) < 0.06
    assert (train.fingerprint, train.dataset, train.node) == (shard.fingerprint, shard.dataset, shard.node)
    assert test.fingerprint == shard.fingerprint


def test_no_person_is_in_both_parts() -> None:
    train, test = hold_out(shard_of(TEXTS, PERSONS), 0.3)
    assert train.data.units is not None
    assert test.data.units is not None
    assert not set(train.data.units) & set(test.data.units)


def test_copies_of_a_text_are_in_one_part() -> None:
    held = is_held_out(shard_of(TEXTS[:50] * 2, None).data, 0.4)
    assert np.array_equal(held[:50], held[50:])


@pytest.mark.parametrize("units", [None, PERSONS])
def test_one_unit_more_or_less_moves_no_other_unit(units: list[str] | None) -> None:
    """What the accounting needs: a neighbouring shard differs in one unit on one side, and nowhere else."""
    whole = is_held_out(shard_of(TEXTS, units).data, 0.2)
    gone = range(400, 404) if units else range(400, 401)
    keep = [i for i in range(2000) if i not in gone]
    some = is_held_out(
        shard_of([TEXTS[i] for i in keep], [units[i] for i in keep] if units else None).data, 0.2
    )
    assert np.array_equal(whole[keep], some)


def test_a_deal_of_the_whole_shard_would_not_do_that() -> None:
    """The mutant: a permutation of all units, as test splits are commonly made."""

    def dealt(n: int) -> np.ndarray:
        held = np.zeros(n, dtype=bool)
        held[np.random.default_rng(0).permutation(n)[: n // 5]] = True
        return held

    assert not np.array_equal(np.delete(dealt(2000), 400), dealt(1999))


def test_a_smaller_share_is_part_of_a_larger_one() -> None:
    data = shard_of(TEXTS, PERSONS).data
    assert not (is_held_out(data, 0.1) & ~is_held_out(data, 0.3)).any()


def test_declared_sizes_are_of_the_declared_size_and_never_counted() -> None:
    for texts in (TEXTS, TEXTS[:10], TEXTS[:1]):
        train, test = hold_out(shard_of(texts, None, declared_size=1000), 0.25)
        assert (train.declared_size, test.declared_size) == (750, 250)
    train, test = hold_out(shard_of(TEXTS, None, declared_size=1), 0.25)
    assert (train.declared_size, test.declared_size) == (1, 1)
