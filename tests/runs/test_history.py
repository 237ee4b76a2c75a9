"""Estimates before the first run: from runs of the same kind on this machine, or none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedtune.config.convert import from_dict
from fedtune.config.files import state_dir
from fedtune.runs.history import NAME, RunHistory, kind, note_run
from fedtune.sweeps.progress import SweepProgress
from tests.support.synthetic import ROUNDS, make_record, write

HERE = {"processor": "one", "usable_cores": 2, "memory_bytes": 8}


def made(seconds: float = 100.0, rounds: int = ROUNDS, **changes: Any) -> dict[str, Any]:
    """A record whose rounds take 10 s each, and `seconds` in all."""
    record = make_record(**changes)
    record["run"].update(seconds=seconds, hardware=dict(HERE))
    record["metrics"]["by_round"] = record["metrics"]["by_round"][:rounds]
    return record


def config(record: dict[str, Any], **federation: Any) -> Any:
    values = json.loads(json.dumps(record["config"]))
    values["federation"].update(federation)
    return from_dict(values)


def test_a_kind_that_was_never_run_has_no_estimate() -> None:
    assert RunHistory(HERE).estimate(config(made())) is None
    progress = SweepProgress(Path("x"), 3, {})
    assert "made none of their kind" in progress.opening([None] * 3)


def test_seconds_by_hand_and_money_by_the_price_book() -> None:
    record = made(seconds=100.0)  # 6 rounds of 10 s, and 40 s around them
    note_run(record)
    same = RunHistory(HERE).estimate(config(record))
    assert same is not None and same.seconds == pytest.approx(100.0)
    assert same.money is not None and same.money.total == pytest.approx(record["cost"]["money"]["total"])
    twice = RunHistory(HERE).estimate(config(record, num_rounds=2 * ROUNDS))
    assert twice is not None and twice.seconds == pytest.approx(40 + 120)
    assert twice.money is not None
    assert twice.money.total == pytest.approx(2 * record["cost"]["money"]["total"])


def test_privacy_seed_and_rate_leave_the_time_alone_and_the_model_does_not() -> None:
    first = made()
    note_run(first)
    known = RunHistory(HERE)
    assert known.estimate(config(made(epsilon=1.0, seed=5, train__learning_rate=0.3))) is not None
    for other in (
        {"quantization": "nf4"},
        {"adapter": "head", "train__head_learning_rate": None, "train__head_rounds": None},
        {"train__sample_rate": 0.9},
        {"epsilon": None},
    ):
        assert known.estimate(config(made(**other))) is None, other
    assert kind(first["config"]) == kind(made(seed=3)["config"])


def test_another_machine_says_nothing_about_this_one() -> None:
    record = made()
    note_run(record)
    assert RunHistory(HERE | {"processor": "another"}).estimate(config(record)) is None


def test_the_median_of_the_last_runs() -> None:
    for seconds in (1000.0, 70.0, 80.0, 90.0, 75.0, 500.0):
        note_run(made(seconds=seconds))
    expected = RunHistory(HERE).estimate(config(made()))
    assert expected is not None and expected.seconds == pytest.approx(80.0), "the first of six is too old"


def test_a_resumed_run_and_one_without_rounds_are_left_out() -> None:
    resumed = made()
    resumed["run"]["attempt"] = 2
    note_run(resumed)
    note_run(made(rounds=0))
    assert not (state_dir() / NAME).exists()


def test_a_damaged_line_costs_that_line() -> None:
    note_run(made())
    path = state_dir() / NAME
    path.write_text('{"kind": \n[1]\n' + path.read_text() + '{"kind": "half')
    assert RunHistory(HERE).estimate(config(made())) is not None
    path.write_bytes(b"\xff\xfe")
    assert RunHistory(HERE).estimate(config(made())) is None


def test_what_the_file_holds_is_no_data_and_no_result() -> None:
    note_run(made())
    line = json.loads((state_dir() / NAME).read_text())
    assert set(line) == {"kind", "machine", "rounds", "seconds", "in_rounds", "records", "cost"}
    assert (state_dir() / NAME).stat().st_mode & 0o077 == 0, "times of private runs are their owner's"


def test_a_full_disk_costs_the_estimate_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("fedtune.runs.history.os.open", full)
        note_run(made())
    assert not (state_dir() / NAME).exists()


def test_the_opening_says_what_is_known_and_what_is_not() -> None:
    note_run(made())
    one = RunHistory(HERE).estimate(config(made()))
    progress = SweepProgress(Path("x"), 4, {}, workers=1)
    text = progress.opening([one, one, one, one])
    # 4 times 60 s in rounds, and once the 40 s around them: the texts are encoded once.
    assert text.startswith("about 4 min 40 s and ") and "USD" in text and "on this machine" in text
    assert "for 2 of them, and no estimate for those" in progress.opening([one, one, None, None])
    assert SweepProgress(Path("x"), 4, {}, workers=2).opening([one] * 4).startswith("about 2 min 40 s")


def test_what_is_prepared_once_is_counted_once() -> None:
    for seconds in (300.0, 65.0, 65.0):
        note_run(made(seconds=seconds))  # 240, 5 and 5 s around 60 s of rounds
    note_run(made(seconds=80.0, quantization="nf4"))
    known = RunHistory(HERE)
    plain, nf4 = known.estimate(config(made())), known.estimate(config(made(quantization="nf4")))
    assert plain is not None and nf4 is not None
    assert (plain.seconds, plain.again) == (65.0, 65.0) and (nf4.seconds, nf4.again) == (80.0, 60.0)
    opening = SweepProgress(Path("x"), 4, {}).opening([plain, plain, nf4, nf4])
    assert opening.startswith("about 4 min 30 s")  # 2 * 65 + 20 + 2 * 60


def test_the_rest_of_a_sweep_does_not_prepare_again(tmp_path: Path) -> None:
    progress = SweepProgress(tmp_path, 3, {})
    for number, seconds, left in ((0, 300.0, "2 min 00 s"), (1, 65.0, "1 min 05 s")):
        write(tmp_path / str(number), made(seconds=seconds))
        progress.refresh()
        assert progress.rest().startswith(f"about {left}")
