"""Privacy bugs that frameworks of this kind have shipped (see PITFALLS), as far as data decides them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedtune.config.schema import DataConfig, PartitionConfig
from fedtune.data.corpus import Corpus, Shard
from fedtune.data.partition import make_shards
from fedtune.data.sources.load import hold_out, load_corpus
from fedtune.data.tokenize import tokenize
from fedtune.errors import DataError, PartitionError
from tests.data.conftest import WordTokenizer, make_corpus, make_tokens
from tests.support.golden import Golden


def write(folder: Path, labels: list[str]) -> DataConfig:
    rows = "".join(f"a text {i},{label}\n" for i, label in enumerate(labels))
    (folder / "train.csv").write_text("text,label\n" + rows)
    return DataConfig(source="files", name="mine", path=str(folder))


# 10: validation, early stopping, model selection or train metrics on private data, unaccounted.


def test_10_no_person_is_both_trained_on_and_tested_on() -> None:
    """Metrics are not charged, so nobody they are computed from may be in a shard."""
    for seed in range(5):
        train, test = hold_out(make_corpus(num_records=300, people=60, sites=3), 0.15, seed)
        assert train.units is not None and test.units is not None
        assert not set(train.units) & set(test.units)


def test_10_a_test_split_with_trained_persons_is_refused(tmp_path: Path) -> None:
    for split, people in (("train", range(20)), ("test", range(19, 30))):
        rows = "".join(f"a text {i},{'ab'[i % 2]},p{i}\n" for i in people)
        (tmp_path / f"{split}.csv").write_text("text,label,who\n" + rows)
    config = DataConfig(source="files", path=str(tmp_path), unit="who", test_split="test")
    with pytest.raises(DataError, match="persons"):
        load_corpus(config, 0)


def test_10_shards_are_cut_from_the_training_part_alone() -> None:
    train, test = hold_out(make_corpus(num_records=100), 0.15, 0)
    (shard,) = _shards(train, PartitionConfig("iid"), 1)
    held_out = {row.tobytes() for row in test.digests}
    assert not held_out & {row.tobytes() for row in shard.data.digests}


def _shards(corpus: Corpus, partition: PartitionConfig, nodes: int) -> list[Shard]:
    return make_shards(tokenize(corpus, WordTokenizer(), "words", 64), partition, nodes, 0)


# 2: the accountant starts afresh. A ledger knows data by its fingerprint, so what must not change it is here.


@pytest.mark.parametrize(
    "partition", [PartitionConfig("iid"), PartitionConfig("dirichlet"), PartitionConfig("natural")]
)
def test_2_another_seed_or_partition_is_not_new_data(partition: PartitionConfig) -> None:
    corpus = make_corpus(num_records=200, people=60, sites=3)
    known = set()
    for seed in range(3):
        train, _ = hold_out(corpus, 0.15, seed)
        tokens = tokenize(train, WordTokenizer(), "words", 64)
        known |= {shard.fingerprint for shard in make_shards(tokens, partition, None, seed)}
    assert known == {corpus.fingerprint()}


# 19: preprocessing from private data: scaler, vocabulary, label set, maximum length, number of steps.


def test_19_a_label_set_from_private_data_is_said(tmp_path: Path) -> None:
    train, _ = load_corpus(write(tmp_path, ["a", "b"] * 20), 0)
    assert any("taken from the training data itself, which no epsilon covers" in n for n in train.notes)


@pytest.mark.parametrize("how", ["data.labels", "categories.json", "labels.txt"])
def test_19_a_public_label_set_does_not_depend_on_who_is_in_the_data(tmp_path: Path, how: str) -> None:
    """One record more, the only one with its label, changes neither the classes nor their order."""
    found = []
    for labels in (["b", "c"] * 20, ["b", "c"] * 20 + ["a"]):
        config = write(tmp_path, labels)
        if how == "data.labels":
            config.labels = ["a", "b", "c"]
        elif how == "categories.json":
            (tmp_path / how).write_text('["a", "b", "c"]')
        else:
            (tmp_path / how).write_text("a\nb\nc\n")
        train, test = load_corpus(config, 0)
        assert train.notes == ()
        found.append((train.label_names, test.label_names))
    assert found[0] == found[1]


def test_19_tokens_of_a_record_do_not_depend_on_the_other_records() -> None:
    """Neither vocabulary nor maximum length comes from the texts: each record is tokenised alone."""
    corpus = make_corpus(num_records=50)
    together = tokenize(corpus, WordTokenizer(), "words", 24)
    for i in (0, 17, 49):
        alone = tokenize(corpus.subset([i]), WordTokenizer(), "words", 24)
        np.testing.assert_array_equal(alone.tokens(0), together.tokens(i))


def test_19_declared_sizes_do_not_tell_whether_one_record_is_there() -> None:
    """Most neighbouring sizes round to the same declared size; the owner of real data declares it."""
    tokens = make_tokens(num_records=1200)
    sizes = {
        make_shards(tokens.subset(np.arange(n)), PartitionConfig("iid"), 1, 0)[0].declared_size
        for n in range(1060, 1140, 13)
    }
    assert sizes == {1100}


# 20: guarantee per record where a person has many.


@pytest.mark.parametrize("name", ["iid", "dirichlet"])
def test_20_all_records_of_a_person_are_on_one_node(name: str) -> None:
    """Also where the promise is per record: a later run per person then needs no other partition."""
    tokens = make_tokens(num_records=300, people=40)
    shards = make_shards(tokens, PartitionConfig(name), 5, 0, "record")
    people = [set(shard.data.units.tolist()) for shard in shards if shard.data.units is not None]
    assert sum(map(len, people)) == len(set.union(*people))


def test_20_a_person_at_two_sites_stops_a_promise_per_person(golden: Golden) -> None:
    tokens = make_tokens(num_records=40, people=4, sites=2)
    assert tokens.sites is not None
    tokens.sites[0] = "elsewhere"
    with pytest.raises(PartitionError) as raised:
        make_shards(tokens, PartitionConfig("natural"), None, 0, "person")
    golden(raised)


def test_20_a_promise_per_person_needs_to_know_the_persons(tmp_path: Path, golden: Golden) -> None:
    with pytest.raises(PartitionError, match=r"data\.unit"):
        make_shards(make_tokens(), PartitionConfig("iid"), 2, 0, "person")
    (tmp_path / "train.csv").write_text("text,label,who\na,x,p\nb,y,\nc,x,q\n")
    with pytest.raises(DataError) as raised:
        load_corpus(DataConfig(source="files", path=str(tmp_path), unit="who"), 0)
    golden(raised)


def test_20_sizes_count_persons_where_the_promise_is_per_person() -> None:
    """Sampling and delta are in persons; a size in records would make both look safer than they are."""
    (shard,) = make_shards(make_tokens(num_records=300, people=40), PartitionConfig("iid"), 1, 0, "person")
    assert shard.declared_size == 40
