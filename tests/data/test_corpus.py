from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.data.corpus import Corpus, fingerprint_of
from fedtune.privacy.ledger.identity import keyed
from tests.data.conftest import make_corpus, make_tokens


def test_fingerprint_is_of_the_content_not_the_order_or_the_name() -> None:
    corpus = make_corpus(people=10, sites=2)
    shuffled = corpus.subset(np.random.default_rng(1).permutation(corpus.num_records))
    assert shuffled.texts != corpus.texts
    assert shuffled.fingerprint() == corpus.fingerprint()
    assert replace(corpus, name="renamed").fingerprint() == corpus.fingerprint()


def test_fingerprint_sees_every_text_and_pair() -> None:
    corpus = make_corpus()
    corpus = replace(corpus, pairs=corpus.texts)
    for field in ("texts", "pairs"):
        changed = list(getattr(corpus, field))
        changed[3] += "!"
        assert replace(corpus, **{field: tuple(changed)}).fingerprint() != corpus.fingerprint()
    assert replace(corpus, pairs=None).fingerprint() != corpus.fingerprint()


def test_another_choice_of_columns_is_not_new_data() -> None:
    """Or a budget could be refilled by naming another label, person or site column."""
    corpus = make_corpus(people=10, sites=2)
    for change in (
        {"units": None},
        {"sites": None},
        {"labels": 1 - corpus.labels},
        {"label_names": ("x", "y")},
        {"name": "renamed"},
    ):
        assert replace(corpus, **change).fingerprint() == corpus.fingerprint()


def test_a_person_whose_spelling_changes_from_file_to_file_is_known_again() -> None:
    """Or one more row with another spelling, which then stands for the person, would be a fresh budget."""
    one = make_corpus(people=1)

    def keys(name: str) -> set[int]:
        found = keyed(replace(one, units=np.full(one.num_records, name)).identity, b"x" * 32).persons
        assert found is not None
        return set(found.tolist())

    plain = keys("p7")
    assert len(plain) == 1  # as books of before have it
    for spelling in ("P7", "p\u200b7", "p\u0667"):
        assert keys(spelling) & plain, spelling
    assert not keys("p8") & plain


def test_fingerprint_counts_repeated_records() -> None:
    corpus = make_corpus()
    assert corpus.subset([0, 0, 1]).fingerprint() != corpus.subset([0, 1]).fingerprint()


def test_every_part_remembers_the_whole() -> None:
    corpus = make_corpus()
    part = corpus.subset(range(30)).subset(range(5))
    assert part.source == corpus.fingerprint() != part.fingerprint()


@given(st.text(), st.text(), st.text(), st.text())
def test_two_different_pairs_of_texts_never_have_one_digest(a: str, b: str, c: str, d: str) -> None:
    def digest(text: str, pair: str) -> bytes:
        return Corpus("x", (text,), (pair,), np.array([0]), ("l",)).digests.tobytes()

    assert (digest(a, b) == digest(c, d)) == ((a, b) == (c, d))


def test_fields_of_unequal_length_are_refused() -> None:
    with pytest.raises(ValueError, match="labels has 1 entries for 2 texts"):
        Corpus("x", ("a", "b"), None, np.array([0]), ("l",))


def test_tokenized_subset_takes_tokens_labels_units_and_order() -> None:
    tokens = make_tokens(num_records=30, people=6, sites=2)
    rows = [7, 3, 3, 29, 0]
    part = tokens.subset(rows)
    assert part.num_records == 5
    for i, row in enumerate(rows):
        np.testing.assert_array_equal(part.tokens(i), tokens.tokens(row))
    np.testing.assert_array_equal(part.labels, tokens.labels[rows])
    assert part.units is not None and tokens.units is not None
    np.testing.assert_array_equal(part.units, tokens.units[rows])
    assert part.fingerprint == fingerprint_of(tokens.digests[rows])


def test_empty_subset_is_a_corpus() -> None:
    part = make_tokens(people=5).subset([])
    assert (part.num_records, part.num_units, len(part.input_ids)) == (0, 0, 0)


def test_unit_index_groups_the_records_of_a_person() -> None:
    tokens = make_tokens(num_records=30, people=6)
    assert tokens.units is not None
    assert tokens.num_units == len(set(tokens.units))
    for code in range(tokens.num_units):
        assert len(set(tokens.units[tokens.unit_index == code])) == 1


def test_without_units_each_record_is_a_person() -> None:
    tokens = make_tokens(num_records=30)
    np.testing.assert_array_equal(tokens.unit_index, np.arange(30))
    assert tokens.num_units == 30


def test_tokens_that_do_not_fit_their_offsets_are_refused() -> None:
    with pytest.raises(ValueError, match="offsets"):
        replace(make_tokens(), input_ids=np.zeros(3, dtype=np.int32))


def test_a_part_cannot_be_given_other_texts() -> None:
    """They would go by the fingerprint of the old ones, and so by their budget."""
    part = make_corpus().subset([3, 1])
    with pytest.raises(ValueError, match="part_of"):
        replace(part, texts=("something", "else"))
    with pytest.raises(ValueError, match="part_of"):
        replace(part, texts=part.texts[::-1])
    with pytest.raises(ValueError, match="part_of"):
        replace(part, pairs=("one", "two"))
    paired = replace(make_corpus(), pairs=("second",) * 40).subset([3, 1])
    with pytest.raises(ValueError, match="part_of"):
        replace(paired, pairs=None)
    assert replace(part, notes=("a note",)).fingerprint() == part.fingerprint()
