"""Reports of runs: what a submitter tells its server, what the server keeps, and what it takes for none."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedtune.deploy import progress as reports
from fedtune.deploy.progress import Progress, Reporter, report_of_rounds
from tests.support.server_parts import rounds


def note(progress: Progress, **values: Any) -> int:
    return progress.note(json.dumps(values).encode())[0]


def test_no_measured_time_is_told() -> None:
    told = report_of_rounds("7", rounds())
    for one in told["rounds"]:
        assert not one["seconds"] and not one["train_seconds"]
        assert one["accuracy"] > 0.5 and one["epsilon"] > 0
    assert "41.5" not in json.dumps(told) and "3.25" not in json.dumps(told)


def test_rounds_are_kept_once_and_in_order_over_a_restart(tmp_path: Path) -> None:
    first, all_of_them = Progress(tmp_path), report_of_rounds("7", rounds(done=5))["rounds"]
    assert note(first, run="7", rounds=all_of_them[3:]) == note(first, run="7", rounds=all_of_them[:4]) == 200
    assert note(first, run="7", statement="# Privacy statement") == 200
    assert first.rounds == {"complete": 5} and first.updates == {"used": 10, "lost": 1}
    kept = Progress(tmp_path).of("7")
    assert [one["round"] for one in kept["rounds"]] == [1, 2, 3, 4, 5]
    assert kept["statement"] == "# Privacy statement"
    assert {"seconds", "train_seconds"}.isdisjoint(kept["rounds"][0])
    assert (tmp_path / "7.json").stat().st_mode & 0o077 == 0


ROUND = report_of_rounds("7", rounds())["rounds"][0]


@pytest.mark.parametrize(
    "values",
    [
        [], {"rounds": []}, {"run": 7}, {"run": "../heads"}, {"run": "7/../../x"}, {"run": ""},
        {"run": "7", "rounds": {}}, {"run": "7", "rounds": [1]}, {"run": "7", "statement": 1},
        {"run": "7", "rounds": [{**ROUND, "round": 0}]}, {"run": "7", "rounds": [{**ROUND, "round": 10**9}]},
        {"run": "7", "rounds": [{**ROUND, "accuracy": "high"}]},
        {"run": "7", "rounds": [{**ROUND, "accuracy": True}]},
        {"run": "7", "rounds": [{**ROUND, "epsilon": float("inf")}]},
        {"run": "7", "rounds": [{**ROUND, "dropped": "x"}]},
        {"run": "7", "rounds": [{**ROUND, "loss": 10**400}]},
        {"run": "7", "rounds": [{**ROUND, "updates": -1}]},
    ],
)  # fmt: skip
def test_what_is_no_report_is_kept_nowhere(tmp_path: Path, values: Any) -> None:
    folder = tmp_path / "progress"
    progress = Progress(folder)
    assert progress.note(json.dumps(values).encode())[0] == 422
    assert progress.note(b"[" * 100_000)[0] == progress.note(b"\xff")[0] == 422
    assert not folder.exists() and list(tmp_path.iterdir()) == [] and not progress.rounds


def test_a_number_is_asked_for_and_never_a_path(tmp_path: Path) -> None:
    (tmp_path / "heads.json").write_text('{"rounds": []}')
    progress = Progress(tmp_path / "progress")
    note(progress, run="7", rounds=[ROUND])
    assert progress.of("7")["run"] == "7"
    assert progress.of("../heads") == progress.of("8") == progress.of("") == {}
    (tmp_path / "progress" / "9.json").write_text("torn")
    assert progress.of("9") == {}


def test_a_run_is_reported_by_whoever_started_it(tmp_path: Path) -> None:
    progress = Progress(tmp_path, {7: "alice", 8: "?"}.get)
    said = json.dumps({"run": "7", "statement": "mine"}).encode()
    assert progress.note(said, "bob")[0] == 403 and progress.of("7") == {}
    assert progress.note(said, "alice")[0] == 200
    assert progress.note(json.dumps({"run": "8", "rounds": [ROUND]}).encode(), "bob")[0] == 200
    assert progress.note(json.dumps({"run": "8", "statement": "hers"}).encode(), "carol")[0] == 403
    ended = Progress(tmp_path, {}.get)  # who started it is known no more, but for what was kept
    assert ended.note(json.dumps({"run": "7", "statement": "his"}).encode(), "bob")[0] == 403
    assert ended.note(said, "alice")[0] == 200 and ended.of("7")["statement"] == "mine"


def test_no_report_of_a_run_that_nobody_started_or_that_ended_without_one_is_kept(tmp_path: Path) -> None:
    progress = Progress(tmp_path / "progress", {7: "alice"}.get)
    for run in ("8", "99999999999999999999"):
        assert progress.note(json.dumps({"run": run, "statement": "forged"}).encode(), "bob")[0] == 404
    assert not (tmp_path / "progress").exists()


def test_what_is_kept_of_a_run_has_an_end_and_what_was_not_kept_is_not_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reports, "_MOST_KEPT", 2000)
    progress = Progress(tmp_path)
    assert note(progress, run="7", rounds=[ROUND]) == 200
    assert note(progress, run="7", rounds=[{**ROUND, "round": 2}], statement="x" * 2000) == 413
    assert progress.rounds == {"complete": 1} and progress.of("7")["statement"] == ""


def test_the_newest_runs_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reports, "_KEPT", 3)
    progress = Progress(tmp_path)
    for run in range(1, 6):
        note(progress, run=str(run), rounds=[ROUND])
        path = tmp_path / f"{run}.json"
        if path.exists():
            import os

            os.utime(path, (run, run))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3.json", "4.json", "5.json"]


def test_a_full_disk_is_said_and_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    progress = Progress(tmp_path)
    monkeypatch.setattr(reports, "replace_whole", full)
    assert note(progress, run="7", rounds=[ROUND]) == 503


def test_a_report_that_did_not_arrive_goes_with_the_next_one() -> None:
    heard: list[list[int]] = []
    up = [False]

    def send(values: Mapping[str, Any]) -> bool:
        heard.append([one["round"] for one in values["rounds"]])
        return up[0]

    reporter, (first, second, third) = Reporter("7", send), rounds(done=3)
    reporter.on_round(first)
    up[0] = True
    reporter.on_round(second)
    reporter.on_round(third)
    reporter.on_finish(SimpleNamespace(history=rounds(number=450, done=450)))  # type: ignore[arg-type]
    assert heard[:3] == [[1], [1, 2], [3]]
    assert [len(one) for one in heard[3:]] == [200, 200, 50]
    longest = report_of_rounds("7", rounds(number=450, done=450)[:200])
    assert len(json.dumps(longest)) < reports.MAX_REPORT / 4
