"""What the ledger knows of the audit log beside it: heads, rows and where there is nothing yet."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from fedtune.privacy.ledger.audit_heads import (
    AuditHead,
    audit_heads,
    ledger_head,
    note_audit_head,
    row_hashes,
)
from fedtune.privacy.ledger.chain import GENESIS, Chain, Head

ONE, TWO = Head(3, "a" * 64), Head(4, "b" * 64)


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    """With one row, of another kind."""
    path = tmp_path / "node.sqlite"
    chain = Chain(path)
    with chain.writing() as connection:
        chain.append(connection, "other", {"line": 1}, run=None, previous=chain.head(connection).hash)
    chain.close()
    return path


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The ledgers whose chains were closed."""
    found: list[Path] = []
    close = Chain.close

    def noted(chain: Chain) -> None:
        found.append(chain.path)
        close(chain)

    monkeypatch.setattr(Chain, "close", noted)
    return found


def test_heads_are_noted_and_found_oldest_first(ledger: Path) -> None:
    assert audit_heads(ledger) == []
    note_audit_head(ledger, ONE)
    note_audit_head(ledger, TWO)
    noted = audit_heads(ledger)
    assert [(one.row, one.log) for one in noted] == [(2, ONE), (3, TWO)]
    assert all(isinstance(one, AuditHead) and one.time.startswith("20") for one in noted)
    assert audit_heads(ledger, 1) == noted[1:] and audit_heads(ledger, 2) == noted


def test_the_same_head_is_noted_once_and_an_earlier_one_again(ledger: Path) -> None:
    for head in (ONE, ONE, TWO, ONE):
        note_audit_head(ledger, head)
    assert [one.log for one in audit_heads(ledger)] == [ONE, TWO, ONE]


@pytest.mark.parametrize(
    "head", [dataclasses.replace(ONE, number=5), dataclasses.replace(ONE, hash="c" * 64)]
)
def test_a_head_that_differs_in_one_part_is_another(ledger: Path, head: Head) -> None:
    note_audit_head(ledger, ONE)
    note_audit_head(ledger, head)
    assert [one.log for one in audit_heads(ledger)] == [ONE, head]


def test_what_is_kept_in_the_row(ledger: Path) -> None:
    note_audit_head(ledger, ONE)
    chain = Chain(ledger)
    with chain.reading() as connection:
        assert connection is not None
        (row,) = chain.latest_of_kind(connection, "witness", -1)
    chain.close()
    assert row.body == {"line": 3, "hash": "a" * 64} and row.run is None


def test_the_ledgers_own_head_and_rows(ledger: Path) -> None:
    first = ledger_head(ledger)
    note_audit_head(ledger, ONE)
    second = ledger_head(ledger)
    assert (first.number, second.number) == (1, 2) and first.hash != second.hash
    assert row_hashes(ledger, [0, 1, 2, 3]) == {0: GENESIS, 1: first.hash, 2: second.hash, 3: None}
    note_audit_head(ledger, TWO)  # the rows make one chain
    assert ledger_head(ledger).number == 3


def test_where_there_is_no_ledger_there_is_nothing_and_none_is_made(tmp_path: Path) -> None:
    path = tmp_path / "none.sqlite"
    note_audit_head(path, ONE)
    assert not path.exists()
    assert audit_heads(path) == [] and ledger_head(path) == Head(0, GENESIS)
    assert row_hashes(path, [0, 1]) == {0: GENESIS, 1: None}
    assert not path.exists()


def test_each_closes_what_it_opened(ledger: Path, closed: list[Path]) -> None:
    for count, act in enumerate((
        lambda: note_audit_head(ledger, ONE),
        lambda: audit_heads(ledger),
        lambda: ledger_head(ledger),
        lambda: row_hashes(ledger, [1]),
    ), start=1):  # fmt: skip
        act()
        assert closed == [ledger] * count


def test_heads_do_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ONE.number = 4  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        AuditHead(1, "", ONE).row = 2  # type: ignore[misc]
