"""Signed requests count once: in bounded memory, over a restart, and where clocks differ."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest

from fedtune.deploy import replays, signing
from fedtune.deploy.replays import Replays
from fedtune.errors import ResourceError

START = datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC)


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = START
        monkeypatch.setattr(replays, "_now", lambda: self.now)

    def after(self, seconds: float) -> datetime.datetime:
        """Sets the clock to so many seconds after the start."""
        self.now = START + datetime.timedelta(seconds=seconds)
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_one_request_counts_once_and_another_key_or_moment_is_another(tmp_path: Path, clock: Clock) -> None:
    seen = Replays(tmp_path)
    when = clock.after(1)
    assert seen.is_first(b"alice", when) and not seen.is_first(b"alice", when)
    assert seen.is_first(b"bob", when)
    assert seen.is_first(b"alice", when + datetime.timedelta(microseconds=1))
    clock.after(signing.BEHIND)  # while its signature is good
    assert not seen.is_first(b"alice", when)


def test_what_is_remembered_has_an_end_and_what_was_forgotten_counts_no_more(
    tmp_path: Path, clock: Clock
) -> None:
    seen = Replays(tmp_path, most=10)
    first = clock.after(1)
    for second in range(1, 16):
        assert seen.is_first(b"alice", clock.after(second))
    assert len(seen._seen) == 10
    with pytest.raises(ResourceError, match="before what the server remembers"):
        seen.is_first(b"alice", first)
    # After its time nothing is kept of a request, which its age keeps out by then.
    clock.after(1000)
    assert seen.is_first(b"alice", clock.after(1000)) and len(seen._seen) == 1


def test_a_restart_lets_nothing_in_twice(tmp_path: Path, clock: Clock) -> None:
    behind = START - datetime.timedelta(seconds=100)  # somebody whose clock is behind
    ahead = START + datetime.timedelta(seconds=13)  # and somebody whose clock is ahead
    before = Replays(tmp_path)
    clock.after(10)
    assert before.is_first(b"ahead", ahead)
    clock.after(11)
    after = Replays(tmp_path)
    for key, when in ((b"behind", behind), (b"ahead", ahead), (b"alice", clock.now)):
        with pytest.raises(ResourceError, match="Ask again when that has passed"):
            after.is_first(key, when)
    assert after.is_first(b"alice", clock.after(10 + signing.AHEAD + 0.1))
    (tmp_path / "signed-until").write_text("torn")
    with pytest.raises(ResourceError):
        Replays(tmp_path).is_first(b"alice", clock.now)


def test_a_server_whose_clock_is_set_back_locks_nobody_out(tmp_path: Path, clock: Clock) -> None:
    clock.after(3600)  # it began an hour ahead
    seen = Replays(tmp_path)
    with pytest.raises(ResourceError, match="signed 0 s before"):  # the first one; its sender asks again
        seen.is_first(b"alice", clock.after(1))
    assert seen.is_first(b"alice", clock.after(2)) and not seen.is_first(b"alice", clock.now)


def test_clocks_that_are_right_write_nothing_and_one_that_is_ahead_needs_a_disk(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Replays(tmp_path / "operators")
    assert seen.is_first(b"alice", clock.after(1)) and not (tmp_path / "operators").exists()

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(replays, "replace_whole", full)
    with pytest.raises(ResourceError, match="No space left"):
        seen.is_first(b"alice", clock.now + datetime.timedelta(seconds=2))
