"""Laws of the ledger's parts: chains, keys and budgets, for contents drawn by hypothesis."""

from __future__ import annotations

import sqlite3
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedtune.federation.client.audit_log import AuditLog
from fedtune.privacy.ledger.budget import Budgets, PrivacyBudget, strictest
from fedtune.privacy.ledger.chain import GENESIS, Chain, Head, Row, broken_link
from fedtune.privacy.ledger.identity import Identity, keyed, mark_of, normalised
from fedtune.privacy.ledger.key_sets import Membership, Pool, array_of, bytes_of

texts = st.text(max_size=12)
bodies = st.dictionaries(texts, st.one_of(st.none(), st.integers(-5, 5), texts, st.lists(st.booleans())))
entries = st.tuples(st.sampled_from(["reserved", "other"]), st.one_of(st.none(), texts), bodies)
written = st.lists(entries, min_size=1, max_size=5)
UNLOCK = "DROP TRIGGER log_is_not_edited; DROP TRIGGER log_is_not_cut;"


def filled(path: Path, contents: list[tuple[str, str | None, dict[str, Any]]]) -> tuple[Chain, list[Row]]:
    chain, rows, previous = Chain(path), [], GENESIS
    with chain.writing() as connection:
        for kind, run, body in contents:
            rows.append(chain.append(connection, kind, body, run=run, previous=previous))
            previous = rows[-1].hash
    return chain, rows


def problems(path: Path) -> list[str]:
    chain = Chain(path)
    with chain.reading() as connection:
        assert connection is not None
        result = chain.audit(connection)[1]
    chain.close()
    return result


@pytest.mark.slow
@settings(max_examples=15)
@given(written)
def test_what_was_appended_is_read_again_and_whole(contents: list[Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        chain, rows = filled(Path(folder) / "log.sqlite", contents)
        with chain.reading() as connection:
            assert connection is not None
            assert list(chain.rows(connection, 0, GENESIS)) == rows
            assert chain.audit(connection) == (rows, [])
            assert chain.head(connection) == Head(rows[-1].seq, rows[-1].hash)
        chain.close()


@pytest.mark.slow
@settings(max_examples=25)
@given(written, st.data())
def test_any_changed_byte_of_a_row_is_found(contents: list[Any], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log.sqlite"
        chain, rows = filled(path, contents)
        chain.close()
        seq = data.draw(st.integers(1, len(rows)))
        column = data.draw(st.sampled_from(["time", "kind", "body", "previous", "hash"]))
        file = sqlite3.connect(path)
        file.executescript(UNLOCK)
        (old,) = file.execute(f"SELECT {column} FROM log WHERE seq = ?", (seq,)).fetchone()
        place = data.draw(st.integers(0, len(old) - 1))
        new = old[:place] + chr((ord(old[place]) + data.draw(st.integers(1, 90))) % 127) + old[place + 1 :]
        file.execute(f"UPDATE log SET {column} = ? WHERE seq = ?", (new, seq))
        file.commit()
        file.close()
        assert any(f"row {seq} was changed" in problem for problem in problems(path))


@settings(max_examples=10)
@given(st.lists(entries, min_size=2, max_size=5), st.data())
def test_a_row_that_was_taken_out_is_found(contents: list[Any], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log.sqlite"
        filled(path, contents)[0].close()
        seq = data.draw(st.integers(1, len(contents)))
        file = sqlite3.connect(path)
        file.executescript(UNLOCK)
        file.execute("DELETE FROM log WHERE seq = ?", (seq,))
        file.commit()
        file.close()
        assert any(f"row {seq} is missing" in problem for problem in problems(path))


@settings(max_examples=25)
@given(st.lists(texts, min_size=1, max_size=4), st.data())
def test_any_changed_byte_of_an_audit_log_shows_in_it_or_in_its_head(
    words: list[str], data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        log = AuditLog(Path(folder) / "audit.jsonl")
        for word in words:
            head = log.append("asked", word=word)
        assert log.verify() == [] and log.head() == head
        content = bytearray(log.path.read_bytes())
        place = data.draw(st.integers(0, len(content) - 2))  # but for the end of the last line
        content[place] ^= data.draw(st.integers(1, 255))
        log.path.write_bytes(content)
        assert log.verify() or log.head() != head


@given(st.integers(0, 5), st.text("0ab", min_size=1), st.integers(0, 9), st.one_of(st.none(), st.text("0ab")))
def test_a_link_is_whole_only_to_the_next_number_and_the_same_hash(
    number: int, digest: str, follows: int, previous: str | None
) -> None:
    assume(follows > number)
    whole = follows == number + 1 and previous == digest
    assert (broken_link(Head(number, digest), follows, previous) is None) == whole


def identity_of(records: list[str], persons: list[str] | None) -> Identity:
    marks = b"".join(mark_of((record, None)) for record in records)
    return Identity(np.frombuffer(marks, dtype=np.uint8).reshape(-1, 32), persons, "print")


@given(st.lists(texts, min_size=1), st.one_of(st.none(), st.lists(texts)), st.randoms(use_true_random=False))
def test_keys_follow_from_content_and_secret_alone(records, persons, random) -> None:  # type: ignore[no-untyped-def]
    first = keyed(identity_of(records, persons), b"a" * 32)
    again = [f" {record.upper()}\n" if record.upper().lower() == record else record for record in records * 2]
    random.shuffle(again)
    second = keyed(identity_of(again, None if persons is None else persons[::-1]), b"a" * 32)
    assert second.id == first.id and np.array_equal(second.records, first.records)
    assert len(first.records) == len({normalised(record) for record in records})
    assert (first.records[1:] > first.records[:-1]).all()
    assert keyed(identity_of(records, persons), b"b" * 32).id != first.id
    assert np.array_equal(array_of(bytes_of(first.records)), first.records)


pairs = st.tuples(texts, st.one_of(st.none(), texts))


@given(pairs, pairs)
def test_two_records_have_one_mark_only_if_they_are_the_same(first: Any, second: Any) -> None:
    def same(record: tuple[str, str | None]) -> tuple[str | None, ...]:
        return tuple(None if part is None else normalised(part) for part in record)

    assert (mark_of(first) == mark_of(second)) == (same(first) == same(second))


numbers = st.sets(st.integers(0, 30))


@given(st.sets(st.integers(0, 30), min_size=1), st.lists(numbers, max_size=5))
def test_keys_are_grouped_by_the_sets_that_they_are_in(mine: set[int], others: list[set[int]]) -> None:
    def array(values: set[int]) -> Any:
        return np.array(sorted(values), dtype=np.uint64)

    sets = {f"s{place}": array(values) for place, values in enumerate(others)}
    groups = Membership(array(mine)).groups(list(sets), sets.__getitem__, Pool())
    assert int(groups.sizes.sum()) == len(mine)
    sharing = {name for name, values in zip(sets, others, strict=True) if values & mine}
    assert set(groups.columns) == sharing
    expected: dict[tuple[bool, ...], int] = {}
    for key in mine:
        pattern = tuple(key in others[int(name[1:])] for name in sorted(sharing))
        expected[pattern] = expected.get(pattern, 0) + 1
    held = [tuple(bool(groups.columns[n][g]) for n in sorted(sharing)) for g in range(len(groups.sizes))]
    assert dict(zip(held, groups.sizes.tolist(), strict=True)) == expected


budgets = st.builds(
    PrivacyBudget,
    st.sampled_from([0.5, 1.0, 3.0]),
    st.sampled_from([1e-7, 1e-5]),
    st.sampled_from([None, "record", "person", "client"]),
)
all_budgets = st.builds(
    Budgets, st.one_of(st.none(), budgets), st.dictionaries(st.sampled_from("abc"), budgets)
)


@given(all_budgets, all_budgets, all_budgets)
def test_the_strictest_of_budgets_knows_no_order_and_is_no_laxer_than_any(
    first: Budgets, second: Budgets, third: Budgets
) -> None:
    both = strictest(first, second)
    assert both == strictest(second, first) and strictest(both, both) == both
    assert strictest(both, third) == strictest(first, strictest(second, third))
    for name in (*"abcd",):
        for one in (first, second):
            for budget in one.of({name}):
                (strict,) = both.of({name})
                assert strict.epsilon <= budget.epsilon and strict.delta <= budget.delta
