"""Observers that pass things on: nothing is lost on the way, and one that fails takes nobody with it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from fedtune.config.schema import Config
from fedtune.federation.events import (
    NullObserver,
    Observer,
    Observers,
    RoundSummary,
    SafeObserver,
    StoppingObserver,
)
from fedtune.runs.trackers import open_tracker

METHODS = {name for name in vars(Observer) if name.startswith("on_")}
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "on_start": ({"run": "r", "attempt": 1},),
    "on_round": (RoundSummary(1, 2, 0.5),),
    "on_client": ("a", "asked"),
    "on_wait": ("for two nodes",),
    "on_finish": (None,),
}


class Remembering(NullObserver):
    """Knows what it was told, and fails where it is told to."""

    def __init__(self, fail: str = "", says: str | None = None) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.fail, self.says = fail, says

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("on_"):
            return object.__getattribute__(self, name)

        def told(*arguments: Any) -> str | None:
            self.calls.append((name, *arguments))
            if name == self.fail:
                raise ValueError("a broken display")
            return self.says if name == "on_round" else None

        return told


def test_every_event_is_tried_here() -> None:
    assert set(ARGUMENTS) == METHODS


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize(
    "around",
    [SafeObserver, Observers, lambda one: StoppingObserver(one, lambda _: None)],
    ids=["safe", "many", "stopping"],
)
def test_what_stands_between_passes_everything_on(around: Any, method: str) -> None:
    inner = Remembering()
    getattr(around(inner), method)(*ARGUMENTS[method])
    assert inner.calls == [(method, *ARGUMENTS[method])]


@pytest.mark.parametrize("method", sorted(METHODS))
def test_no_tracker_and_the_silent_observer_take_every_event(method: str, tmp_path: Path) -> None:
    for one in (NullObserver(), open_tracker(Config(), tmp_path)):
        assert getattr(one, method)(*ARGUMENTS[method]) is None


def test_one_that_fails_is_told_of_once_and_the_others_go_on(caplog: pytest.LogCaptureFixture) -> None:
    broken, well = Remembering(fail="on_client"), Remembering()
    both = Observers(broken, well)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            both.on_client("a", "asked")
        both.on_finish(None)  # type: ignore[arg-type]
    assert len(broken.calls) == 1 and len(well.calls) == 4
    assert len(caplog.records) == 1 and "a broken display" in caplog.text


def test_any_of_several_may_end_the_run() -> None:
    summary = RoundSummary(1, 2, 0.5)
    assert Observers(Remembering(), Remembering(says="enough")).on_round(summary) == "enough"
    assert Observers(Remembering(), Remembering()).on_round(summary) is None
    assert StoppingObserver(Remembering(says="inner"), lambda _: None).on_round(summary) == "inner"
    assert StoppingObserver(Remembering(says="inner"), lambda _: "bad").on_round(summary) == "bad"
