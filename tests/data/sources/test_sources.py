from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.config.schema import DataConfig
from fedtune.data.sources.load import hold_out, load_corpus
from fedtune.errors import DataError
from tests.data.conftest import make_corpus
from tests.support.golden import Golden


@settings(max_examples=50)
@given(
    num_records=st.integers(10, 200),
    people=st.one_of(st.none(), st.integers(4, 60)),
    sites=st.one_of(st.none(), st.integers(1, 4)),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 5),
)
def test_hold_out_splits_persons_never(
    num_records: int, people: int | None, sites: int | None, fraction: float, seed: int
) -> None:
    corpus = make_corpus(num_records=num_records, people=people, sites=sites)
    try:
        train, test = hold_out(corpus, fraction, seed)
    except DataError:
        # Only if no site has two persons.
        units = corpus.texts if corpus.units is None else corpus.units
        names = ["all"] * num_records if corpus.sites is None else corpus.sites
        persons = {site: {u for u, s in zip(units, names, strict=True) if s == site} for site in set(names)}
        assert all(len(members) < 2 for members in persons.values())
        return
    assert sorted((*train.texts, *test.texts)) == sorted(corpus.texts)
    assert train.num_records and test.num_records
    if train.units is not None and test.units is not None:
        assert not set(train.units) & set(test.units)


def test_every_site_is_on_both_sides_in_its_share() -> None:
    corpus = make_corpus(num_records=1000, people=300, sites=3)
    train, test = hold_out(corpus, 0.15, 0)
    assert train.units is not None and test.units is not None
    assert train.sites is not None and test.sites is not None
    for site in ("site-0", "site-1", "site-2"):
        held = len(set(test.units[test.sites == site]))
        rest = len(set(train.units[train.sites == site]))
        assert held / (held + rest) == pytest.approx(0.15, abs=0.01)


def test_equal_seeds_split_equally_and_others_do_not() -> None:
    corpus = make_corpus(num_records=100)
    assert hold_out(corpus, 0.15, 1)[1].texts == hold_out(corpus, 0.15, 1)[1].texts
    assert hold_out(corpus, 0.15, 1)[1].texts != hold_out(corpus, 0.15, 2)[1].texts


def test_a_person_at_two_sites_is_on_one_side() -> None:
    corpus = make_corpus(num_records=60, people=20, sites=2)
    assert corpus.sites is not None
    mixed = replace(corpus, sites=np.array([f"site-{i % 2}" for i in range(60)]))
    train, test = hold_out(mixed, 0.3, 0)
    assert train.units is not None and test.units is not None
    assert not set(train.units) & set(test.units)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_a_fraction_that_is_none(fraction: float, golden: Golden) -> None:
    with pytest.raises(DataError) as raised:
        hold_out(make_corpus(), fraction, 0)
    golden(raised)


def test_one_person_cannot_be_split(golden: Golden) -> None:
    with pytest.raises(DataError) as raised:
        hold_out(make_corpus(people=1), 0.15, 0)
    golden(raised)


def write(folder: Path, split: str, people: range) -> None:
    rows = "".join(f"text {split} {i},{'ab'[i % 2]},p{i}\n" for i in people)
    (folder / f"{split}.csv").write_text("text,label,who\n" + rows)


def test_a_test_split_that_shares_persons_with_training_is_refused(tmp_path: Path, golden: Golden) -> None:
    write(tmp_path, "train", range(20))
    write(tmp_path, "test", range(18, 30))
    config = DataConfig(source="files", name="mine", path=str(tmp_path), unit="who", test_split="test")
    with pytest.raises(DataError) as raised:
        load_corpus(config, 0)
    golden(raised)
    # Nobody is named, so nobody is known to be in both.
    assert load_corpus(replace(config, unit=None), 0)[1].num_records == 12


def test_the_test_split_has_the_label_set_of_training(tmp_path: Path, golden: Golden) -> None:
    write(tmp_path, "train", range(20))
    (tmp_path / "test.csv").write_text("text,label,who\nx,a,q\ny,c,r\n")
    config = DataConfig(source="files", name="mine", path=str(tmp_path), test_split="test")
    with pytest.raises(DataError) as raised:
        load_corpus(config, 0)
    golden(raised)


def test_no_such_source(golden: Golden) -> None:
    with pytest.raises(DataError) as raised:
        load_corpus(DataConfig(source="sql"), 0)
    golden(raised)


def test_opinions_has_four_sites_on_both_sides(real_sdist: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDTUNE_OPINIONS", str(real_sdist))
    train, test = load_corpus(DataConfig(), 0)
    assert train.num_records + test.num_records == 23703
    assert test.num_records == pytest.approx(0.15 * 23703, rel=0.02)
    assert train.units is not None and test.units is not None and test.sites is not None
    assert set(test.sites) == {"movies", "products", "editorials", "tweets"}
    assert not set(train.units) & set(test.units)
    assert load_corpus(DataConfig(name="renamed"), 0)[0].fingerprint() == train.fingerprint()


def test_nothing_is_cut_off_where_nothing_is_tested_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedtune.data.corpus import Corpus
    from fedtune.data.sources import opinions

    texts = tuple(f"text {i}" for i in range(20))
    labels = np.arange(20, dtype=np.int64) % 2
    whole = Corpus("opinions", texts, None, labels, ("a", "b"))
    monkeypatch.setattr(opinions, "load_opinions", lambda: whole)
    train, test = load_corpus(DataConfig(source="opinions"), 0, testing=False)
    assert (train.num_records, test.num_records) == (20, 0)
    train, test = load_corpus(DataConfig(source="opinions"), 0)
    assert (train.num_records, test.num_records) == (17, 3)
