from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.config.schema import PartitionConfig
from fedtune.data.array_cache import store_array
from fedtune.data.corpus import Corpus, Shard, TokenizedCorpus
from fedtune.data.partition import is_held_out, make_shards, round_size, split_shard
from fedtune.errors import PartitionError
from tests.data.conftest import make_tokens
from tests.support.golden import Golden

NATURAL, IID = PartitionConfig("natural"), PartitionConfig("iid")


def dirichlet(alpha: float) -> PartitionConfig:
    return PartitionConfig("dirichlet", alpha)


def assert_a_partition(train: TokenizedCorpus, shards: list[Shard]) -> None:
    """Every record is in exactly one shard, unchanged, and no person is in two."""
    rows = np.concatenate([shard.record_index for shard in shards])
    assert sorted(rows.tolist()) == list(range(train.num_records))
    owner: dict[str, str] = {}
    for shard in shards:
        assert shard.data.num_records > 0
        assert shard.fingerprint == train.source
        assert shard.dataset == train.name
        for i, row in enumerate(shard.record_index):
            np.testing.assert_array_equal(shard.data.tokens(i), train.tokens(int(row)))
        for person in set(train.unit_index[shard.record_index].tolist()):
            assert owner.setdefault(person, shard.node) == shard.node


def test_natural_is_one_node_a_site_with_its_name() -> None:
    train = make_tokens(num_records=60, people=20, sites=3)
    shards = make_shards(train, NATURAL, None, 0, "person")
    assert [shard.node for shard in shards] == ["site-0", "site-1", "site-2"]
    for shard in shards:
        assert shard.data.sites is not None
        assert set(shard.data.sites) == {shard.node}
    assert_a_partition(train, shards)


@pytest.mark.parametrize("partition", [IID, dirichlet(0.5)])
@pytest.mark.parametrize("people", [None, 30])
@pytest.mark.parametrize("nodes", [1, 2, 7])
def test_dealt_shards_are_a_partition_and_keep_persons_together(
    partition: PartitionConfig, people: int | None, nodes: int
) -> None:
    train = make_tokens(num_records=200, people=people, labels=3)
    shards = make_shards(train, partition, nodes, 0)
    assert len(shards) == nodes
    assert_a_partition(train, shards)


def test_iid_deals_persons_evenly_and_at_random() -> None:
    train = make_tokens(num_records=400)
    sizes = [shard.data.num_records for shard in make_shards(train, IID, 8, 0)]
    assert sizes == [50] * 8
    first = make_shards(train, IID, 8, 0)[0].record_index
    assert first.tolist() != list(range(50))


def test_dirichlet_is_the_more_uneven_the_smaller_alpha() -> None:
    train = make_tokens(num_records=2000, labels=2)

    def spread(alpha: float) -> float:
        shards = [s for seed in range(5) for s in make_shards(train, dirichlet(alpha), 5, seed)]
        return float(np.std([shard.data.labels.mean() for shard in shards]))

    assert spread(1000.0) < 0.1 < spread(0.3)


@pytest.mark.parametrize("partition", [IID, dirichlet(0.5)])
def test_equal_seeds_deal_equally_and_others_do_not(partition: PartitionConfig) -> None:
    train = make_tokens(num_records=200, people=80)

    def deal(seed: int) -> list[list[int]]:
        return [shard.record_index.tolist() for shard in make_shards(train, partition, 4, seed)]

    assert deal(1) == deal(1)
    assert deal(1) != deal(2)


def test_a_small_alpha_is_drawn_again_until_no_node_is_empty() -> None:
    train = make_tokens(num_records=2000, labels=2)
    for seed in range(5):
        shards = make_shards(train, dirichlet(0.1), 10, seed)
        assert min(shard.data.num_records for shard in shards) >= 1


@pytest.mark.slow
def test_a_hopeless_alpha_is_said(golden: Golden) -> None:
    with pytest.raises(PartitionError) as raised:
        make_shards(make_tokens(num_records=60), dirichlet(0.001), 20, 0)
    golden(raised)


def test_more_nodes_than_records_or_persons(golden: Golden) -> None:
    with pytest.raises(PartitionError) as raised:
        make_shards(make_tokens(), IID, 41, 0)
    golden(raised)
    with pytest.raises(PartitionError) as raised:
        make_shards(make_tokens(people=5), dirichlet(0.5), 6, 0)
    golden(raised)


def test_as_many_nodes_as_records() -> None:
    train = make_tokens()
    assert_a_partition(train, make_shards(train, IID, 40, 0))


def test_node_names_sort_as_numbers_do() -> None:
    names = [shard.node for shard in make_shards(make_tokens(), IID, 12, 0)]
    assert names == sorted(names)
    assert names[0] == "node-00"


def test_natural_with_another_number_of_nodes(golden: Golden) -> None:
    train = make_tokens(people=20, sites=3)
    with pytest.raises(PartitionError) as raised:
        make_shards(train, NATURAL, 10, 0)
    golden(raised)
    assert len(make_shards(train, NATURAL, 3, 0)) == 3


@pytest.mark.parametrize("name", ["Ward 3 / East", "../../x", "a\\b", "..", "x" * 201])
def test_a_site_whose_ledger_could_not_have_its_name(name: str, golden: Golden) -> None:
    train = make_tokens(people=20, sites=3)
    assert train.sites is not None
    sites = np.where(train.sites == train.sites[0], name, train.sites)
    with pytest.raises(PartitionError) as raised:
        make_shards(replace(train, sites=sites), NATURAL, None, 0)
    golden(raised)


def test_natural_without_sites_deals_out_and_says_so() -> None:
    train = make_tokens()
    with pytest.warns(UserWarning, match="no site column"):
        shards = make_shards(train, NATURAL, None, 0)
    assert [shard.node for shard in shards] == ["node-0", "node-1", "node-2", "node-3"]
    assert_a_partition(train, shards)


def test_without_nodes_there_are_as_many_as_sites() -> None:
    assert len(make_shards(make_tokens(people=20, sites=3), IID, None, 0)) == 3
    assert len(make_shards(make_tokens(), IID, None, 0)) == 4


def test_a_person_at_two_sites_cannot_be_promised_anything_by_one_node(golden: Golden) -> None:
    train = make_tokens(num_records=60, people=20, sites=3)
    assert train.sites is not None
    sites = train.sites.copy()
    row = int(np.flatnonzero(np.bincount(train.unit_index)[train.unit_index] > 1)[0])
    sites[row] = "site-elsewhere"
    moved = replace(train, sites=sites)
    with pytest.raises(PartitionError) as raised:
        make_shards(moved, NATURAL, None, 0, "person")
    golden(raised)
    assert len(make_shards(moved, NATURAL, None, 0, "record")) == 4


def test_person_without_a_unit_column(golden: Golden) -> None:
    with pytest.raises(PartitionError) as raised:
        make_shards(make_tokens(), IID, 2, 0, "person")
    golden(raised)


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_alpha_must_be_a_concentration(alpha: float, golden: Golden) -> None:
    with pytest.raises(PartitionError) as raised:
        make_shards(make_tokens(), dirichlet(alpha), 2, 0)
    golden(raised)


def test_no_nodes_and_no_such_partition(golden: Golden) -> None:
    with pytest.raises(PartitionError) as raised:
        make_shards(make_tokens(), IID, 0, 0)
    golden(raised)
    with pytest.raises(PartitionError) as raised:
        make_shards(make_tokens(), PartitionConfig("shards"), 2, 0)
    golden(raised)


def test_declared_size_is_in_the_unit_of_the_plan() -> None:
    train = make_tokens(num_records=500, people=37)
    (by_record,) = make_shards(train, IID, 1, 0, "record")
    (by_person,) = make_shards(train, IID, 1, 0, "person")
    assert by_record.declared_size == 500
    assert by_person.declared_size == 37


@pytest.mark.parametrize(
    ("count", "declared"), [(1, 1), (9, 9), (99, 99), (104, 100), (105, 110), (9014, 9000), (20133, 20000)]
)
def test_declared_sizes_have_two_significant_digits(count: int, declared: int) -> None:
    assert round_size(count) == declared


@given(st.integers(1, 10**9))
def test_rounding_moves_a_size_by_at_most_a_twentieth(count: int) -> None:
    declared = round_size(count)
    assert declared >= 1
    assert abs(declared - count) <= max(0, count / 20)
    assert len(str(declared).rstrip("0")) <= 2


@pytest.mark.parametrize("partition", [NATURAL, IID, dirichlet(0.5)])
def test_second_time_needs_no_partitioner(
    home: Path, partition: PartitionConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = make_tokens(num_records=100, people=30, sites=3)
    first = make_shards(train, partition, 3, 0)
    monkeypatch.setitem(sys.modules, "flwr_datasets.partitioner", None)
    second = make_shards(train, partition, 3, 0)
    assert [s.record_index.tolist() for s in first] == [s.record_index.tolist() for s in second]
    with pytest.raises(ImportError):
        make_shards(make_tokens(num_records=100, people=30, sites=3, seed=9), partition, 3, 0)


@pytest.mark.parametrize("field", ["labels", "sites", "units"])
def test_a_cached_deal_for_other_columns_is_not_used(home: Path, field: str) -> None:
    train = make_tokens(num_records=300, people=60, sites=3)
    partition = NATURAL if field == "sites" else dirichlet(0.5)
    before = make_shards(train, partition, 3, 0)
    column = getattr(train, field)
    after = make_shards(replace(train, **{field: column[::-1].copy()}), partition, 3, 0)
    assert [s.record_index.tolist() for s in before] != [s.record_index.tolist() for s in after]


def test_a_cached_deal_for_other_nodes_is_not_used(home: Path) -> None:
    train = make_tokens(num_records=100)
    good = [shard.record_index.tolist() for shard in make_shards(train, IID, 4, 0)]
    (file,) = (home / "cache" / "partitions").iterdir()
    store_array(file, np.zeros(100, dtype=np.int32))
    with pytest.warns(UserWarning, match="built anew"):
        again = make_shards(train, IID, 4, 0)
    assert [shard.record_index.tolist() for shard in again] == good


def test_flowers_progress_bar_stays_off_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    make_shards(make_tokens(people=20, sites=3), NATURAL, None, 0)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_natural_deals_as_flower_does() -> None:
    from flwr_datasets.partitioner import NaturalIdPartitioner

    from fedtune.data.partition import _partition, _table

    train = make_tokens(num_records=90, people=30, sites=5)
    flower = NaturalIdPartitioner(partition_by="site")
    assert train.sites is not None
    flower.dataset = _table(row=np.arange(90), site=train.sites)
    node_of_record = _partition(train, "natural", 0.0, 5, 0)
    for node in range(5):
        rows = np.flatnonzero(node_of_record == node)
        assert rows.tolist() == list(flower.load_partition(node)["row"])


# A shard cut in two for private evaluation: by unit, the same ones always, and nobody on both sides.


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
    train, test = split_shard(shard, 0.2)
    rows = np.concatenate([train.record_index, test.record_index])
    assert np.array_equal(np.sort(rows), np.arange(2000))
    assert abs(test.data.num_records / 2000 - 0.2) < 0.06
    assert (train.fingerprint, train.dataset, train.node) == (shard.fingerprint, shard.dataset, shard.node)
    assert test.fingerprint == shard.fingerprint


def test_no_person_is_in_both_parts() -> None:
    train, test = split_shard(shard_of(TEXTS, PERSONS), 0.3)
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


@given(st.lists(st.integers(0, 8), min_size=1, max_size=40), st.floats(0.01, 0.99), st.floats(0.01, 0.99))
def test_law_a_split_is_by_unit_complete_and_grows_with_its_share(
    persons: list[int], share: float, other: float
) -> None:
    shard = shard_of([f"text {i}" for i in range(len(persons))], [f"person {i}" for i in persons])
    train, test = split_shard(shard, share)
    rows = np.concatenate([train.record_index, test.record_index])
    assert sorted(rows.tolist()) == list(range(len(persons)))
    assert train.data.units is not None and test.data.units is not None
    assert not set(train.data.units) & set(test.data.units)
    assert train.identity is test.identity is shard.identity  # a release from either is charged to all
    small, large = sorted([share, other])
    assert not (is_held_out(shard.data, small) & ~is_held_out(shard.data, large)).any()


@settings(max_examples=25)
@given(
    st.integers(8, 60),
    st.integers(4, 8),
    st.integers(1, 3),
    st.sampled_from(["natural", "iid"]),
    st.integers(0, 9),
)
def test_law_shards_are_a_partition(records: int, people: int, sites: int, name: str, seed: int) -> None:
    train = make_tokens(num_records=records, people=people, sites=sites, seed=seed)
    nodes = None if name == "natural" else min(3, train.num_units)
    assert_a_partition(train, make_shards(train, PartitionConfig(name), nodes, seed, "person"))


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
        train, test = split_shard(shard_of(texts, None, declared_size=1000), 0.25)
        assert (train.declared_size, test.declared_size) == (750, 250)
    train, test = split_shard(shard_of(TEXTS, None, declared_size=1), 0.25)
    assert (train.declared_size, test.declared_size) == (1, 1)
