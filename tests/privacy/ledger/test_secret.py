"""A node's secret is whole or not there, its owner's alone, and always the one that its ledger knows."""

from __future__ import annotations

import stat
import subprocess
import sys
from pathlib import Path

import pytest

from fedtune.errors import LedgerError
from fedtune.privacy.ledger import secret as secrets
from fedtune.privacy.ledger.budget_file import PrivacyBudget
from fedtune.privacy.ledger.ledger import PrivacyLedger
from tests.support.ledgers import identity
from tests.support.plans import local_plan

DATA = identity(range(20), ["p1", "p2"])


def reserve(path: Path, run: str = "run", round: int = 0) -> None:
    PrivacyLedger(path).reserve(
        dataset="visits", fingerprint=DATA, node="clinic", run=run, round=round, plan=local_plan()
    )


@pytest.fixture
def used(tmp_path: Path) -> Path:
    path = tmp_path / "ledger.sqlite"
    reserve(path)
    return path


def test_it_is_made_with_the_first_release_for_the_owner_alone(used: Path) -> None:
    key = used.with_suffix(".key")
    assert len(key.read_bytes()) == 32 and stat.S_IMODE(key.stat().st_mode) == 0o600
    before = key.read_bytes()
    reserve(used, round=1)
    assert key.read_bytes() == before
    assert sorted(path.name for path in used.parent.glob("ledger.*") if "-" not in path.name) == [
        "ledger.key", "ledger.sqlite"
    ]  # fmt: skip


def test_asking_makes_none(tmp_path: Path) -> None:
    ledger = PrivacyLedger(tmp_path / "ledger.sqlite")
    assert ledger.epsilon(dataset="visits", fingerprint=DATA) == 0.0
    ledger.set_budget(PrivacyBudget(8.0, 1e-5))
    ledger.check_run(dataset="visits", fingerprint=DATA, node="n", run="r", plans=[local_plan()])
    assert not list(tmp_path.glob("*.key"))


@pytest.mark.parametrize("content", [None, b"", b"short", bytes(32), b"x" * 33, bytes(range(32))])
def test_a_lost_torn_or_other_secret_is_refused_with_the_way_out(used: Path, content: bytes | None) -> None:
    """Under another one every record would look new, and what was spent would be forgotten."""
    key = used.with_suffix(".key")
    whole = key.read_bytes()
    key.unlink()
    if content is not None:
        key.write_bytes(content)
        key.chmod(0o600)
    for act in (
        lambda: PrivacyLedger.open(used),
        lambda: reserve(used, "run-2"),
        lambda: PrivacyLedger(used).epsilon(dataset="visits", fingerprint=DATA),
    ):
        with pytest.raises(LedgerError, match=r"ledger\.key.*No release is made.*from a backup"):
            act()
    assert (key.read_bytes() if key.exists() else None) == content  # never replaced
    assert len(PrivacyLedger(used).releases()) == 1  # what was spent can still be shown
    key.write_bytes(whole)
    key.chmod(0o600)
    reserve(used, "run-2")


@pytest.mark.parametrize("content", [b"", b"short", bytes(32)])
def test_a_torn_secret_is_not_begun_with(tmp_path: Path, content: bytes) -> None:
    key = tmp_path / "ledger.key"
    key.write_bytes(content)
    key.chmod(0o600)
    with pytest.raises(LedgerError, match="torn"):
        reserve(tmp_path / "ledger.sqlite")
    assert key.read_bytes() == content and PrivacyLedger(tmp_path / "ledger.sqlite").releases() == []


def test_a_secret_that_others_may_read_is_refused(used: Path) -> None:
    key = used.with_suffix(".key")
    for mode in (0o644, 0o640, 0o602):
        key.chmod(mode)
        with pytest.raises(LedgerError, match=f"chmod 600 {key}"):
            reserve(used, "run-2")


_FULL = """
import resource, signal, sys
from pathlib import Path
from fedtune.errors import LedgerError
from fedtune.privacy.ledger.secret import make_secret
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    make_secret(Path(sys.argv[1]))
except LedgerError as error:
    print("cannot be written" in str(error))
"""


@pytest.mark.parametrize("limit", [0, 31])
def test_pitfall_41_a_full_disk_leaves_no_torn_secret(tmp_path: Path, limit: int) -> None:
    path = tmp_path / "ledger.key"
    done = subprocess.run(
        [sys.executable, "-c", _FULL, str(path), str(limit)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["True"]
    assert list(tmp_path.iterdir()) == []


def test_what_is_kept_of_it_says_nothing(used: Path) -> None:
    key = used.with_suffix(".key").read_bytes()
    books = used.read_bytes()
    assert key not in books and key.hex().encode() not in books
    assert secrets.check_of(key).encode() in books
