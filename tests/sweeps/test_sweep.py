"""Sweeps: counted before they start, one line a run, failures recorded, resumed where they were left."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fedtune.config.loader import save_config
from fedtune.config.schema import Config
from fedtune.errors import BudgetExhausted, CheckpointError, ConfigError
from fedtune.privacy.accounting.selection import TrialCount
from fedtune.report.collect import collect
from fedtune.sweeps import options
from fedtune.sweeps.options import SweepOptions, distinct_jobs, split_options
from fedtune.sweeps.sweep import Sweep, SweepOutcome, run_sweep
from tests.support.golden import Golden
from tests.support.synthetic import make_record, write

GRID = ["privacy.epsilon=1,2,8", "hydra.sweep.dir=sweep"]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class Runs:
    """Stands in for training: writes a made-up record, or fails where it is told to."""

    def __init__(self) -> None:
        self.made: list[Config] = []
        self.titles: list[str] = []
        self.said: list[str] = []
        self.warned: list[str] = []
        self.fail: dict[int, BaseException] = {}
        self.left_out: dict[int, dict[str, str]] = {}
        self.accuracies: list[float] = []

    def start(self, config: Config, title: str, stop_rule: Any = None, alone: bool = True) -> Path:
        self.titles.append(title)
        folder = Path(config.output or "")
        assert folder.is_dir()
        if len(self.titles) - 1 in self.fail:
            raise self.fail[len(self.titles) - 1]
        self.made.append(config)
        made = make_record(
            epsilon=config.privacy.epsilon,
            seed=config.seed,
            train__learning_rate=config.train.learning_rate,
            accuracy=self.accuracies[len(self.made) - 1] if self.accuracies else None,
            left_out=self.left_out.get(len(self.made) - 1),
        )
        made["run"]["id"] += folder.name
        if self.accuracies and self.accuracies[len(self.made) - 1] == 0.0:  # hidden by the noise
            made["metrics"]["accuracy"] = None
        return write(folder, made)

    def sweep(self, *words: str) -> list[Any]:
        return self.outcome(*words).failures

    def outcome(self, *words: str) -> SweepOutcome:
        return run_sweep(
            words,
            self.start,
            describe=lambda error: f"{type(error).__name__}: {error}",
            say=self.said.append,
            warn=self.warned.append,
        )


@pytest.mark.slow
def test_all_combinations_run_and_each_says_one_line() -> None:
    runs = Runs()
    assert runs.sweep(*GRID) == []
    assert [config.privacy.epsilon for config in runs.made] == [1, 2, 8]
    opening, *lines = runs.said
    assert opening.startswith("3 runs in sweep") and "known after the first" in opening
    assert len(lines) == 3
    first = lines[0]
    assert first.startswith("run 1 of 3 (privacy.epsilon=1): accuracy ")
    for word in ("delta", "add or remove one record", "USD", "best so far", "left: about "):
        assert word in first, word
    assert "left" not in lines[2]
    assert "best so far" in lines[2] and "privacy.epsilon=8" in lines[2].split("best so far")[1]


@pytest.mark.slow
def test_a_site_that_took_no_part_is_named_in_its_line_and_of_the_whole_sweep() -> None:
    runs = Runs()
    runs.left_out = {1: {"east": "BudgetExhausted: no"}}
    outcome = runs.outcome(*GRID)
    assert outcome.failures == [] and outcome.partial == {1: ("east",)}
    assert "without east, which took no part" in runs.said[2] and "east" not in runs.said[1] + runs.said[3]


@pytest.mark.slow
def test_settings_are_compared_over_the_seeds_that_both_have() -> None:
    runs = Runs()
    # Seed 1 is the lucky one. By its best run 1 would win, and by its mean too while 8 has seed 0 alone.
    runs.accuracies = [0.70, 0.80, 0.72, 0.82]
    runs.sweep("privacy.epsilon=1,8", "seed=0,1", "hydra.sweep.dir=sweep")
    best = [line.split("best so far ")[1].split(";")[0] for line in runs.said[1:]]
    assert best == [
        "70.0 percent (privacy.epsilon=1)",
        "75.0 percent (privacy.epsilon=1, mean of 2 seeds)",
        "72.0 percent (privacy.epsilon=8)",
        # Two points at each seed: the seeds' spread of ten is in no error.
        "77.0 percent (privacy.epsilon=8, mean of 2 seeds), 2.0 ± 0.0 points above privacy.epsilon=1 over 2 "
        "common seeds",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("last", [False, True])
def test_the_mean_of_what_the_noise_left_is_not_the_best(last: bool) -> None:
    """It hides what is low: the report rates such a configuration not at all."""
    runs = Runs()
    runs.accuracies = [0.90, 0.0, 0.72, 0.82] if last else [0.0, 0.90, 0.72, 0.82]
    runs.sweep("privacy.epsilon=1,8", "seed=0,1", "hydra.sweep.dir=sweep")
    assert "best so far" not in runs.said[2]
    assert runs.said[-1].endswith("best so far 77.0 percent (privacy.epsilon=8, mean of 2 seeds)")


@pytest.mark.slow
def test_a_line_names_what_sets_its_run_apart_and_no_more() -> None:
    runs = Runs()
    runs.sweep("seed=1,2", "adapter=head", "train.local_steps=3", "hydra.sweep.dir=sweep")
    assert [line.split(":")[0] for line in runs.said[1:]] == ["run 1 of 2 (seed=1)", "run 2 of 2 (seed=2)"]
    assert runs.titles == ["run 1 of 2 (seed=1)", "run 2 of 2 (seed=2)"]


@pytest.mark.slow
def test_the_folder_says_what_the_sweep_was() -> None:
    Runs().sweep(*GRID)
    kept = json.loads(Path("sweep/sweep.json").read_text())
    assert kept["overrides"] == GRID and len(kept["jobs"]) == 3
    assert "private_selection" not in kept


@pytest.mark.slow
def test_a_failed_run_is_recorded_and_the_others_go_on() -> None:
    runs = Runs()
    runs.fail[1] = BudgetExhausted("node 'a' refuses")
    (failure,) = runs.sweep(*GRID)
    assert failure.number == 1 and len(runs.made) == 2
    kept = json.loads(Path("sweep/1/failure.json").read_text())
    assert kept["error"] == "BudgetExhausted: node 'a' refuses" and kept["overrides"] == "privacy.epsilon=2"
    assert "run 2 of 3" in runs.warned[0] and "refuses" in runs.warned[0]
    assert "1 run failed" in collect([Path("sweep")]).notes[0]


@pytest.mark.slow
def test_resuming_makes_only_what_is_missing() -> None:
    runs = Runs()
    runs.fail[2] = BudgetExhausted("no more")
    runs.sweep(*GRID)
    again = Runs()
    assert again.sweep("sweep.resume=sweep") == []
    assert [config.privacy.epsilon for config in again.made] == [8]
    assert "2 finished before, 1 to go: about" in again.said[0] and "USD" in again.said[0]
    assert sum("finished before" in line for line in again.said[1:]) == 2
    assert not Path("sweep/2/failure.json").exists(), "a failure that was mended is forgotten"
    assert Runs().sweep("sweep.resume=sweep") == []


@pytest.mark.slow
def test_an_interrupt_ends_the_sweep_and_says_how_to_go_on() -> None:
    runs = Runs()
    runs.fail[1] = KeyboardInterrupt("Interrupted.")
    with pytest.raises(KeyboardInterrupt, match=r"Interrupted\. .*fedtune run sweep\.resume=sweep"):
        runs.sweep(*GRID)
    again = Runs()
    again.sweep("sweep.resume=sweep")
    assert len(again.made) == 2


@pytest.mark.slow
def test_a_copied_folder_is_resumed_where_it_lies_now() -> None:
    runs = Runs()
    runs.fail[2] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        runs.sweep(*GRID)
    shutil.move("sweep", "another's machine")
    again = Runs()
    again.sweep("sweep.resume=another's machine")
    (config,) = again.made
    assert Path(config.output or "") == Path.cwd() / "another's machine" / "2"
    assert not Path("sweep").exists()


@pytest.mark.slow
def test_a_half_written_record_is_made_again() -> None:
    Runs().sweep(*GRID)
    path = Path("sweep/1/record.json")
    path.write_text(path.read_text()[:500])
    again = Runs()
    again.sweep("sweep.resume=sweep")
    assert len(again.made) == 1 and "half-written" in again.warned[0]


@pytest.mark.slow
def test_a_begun_run_goes_on_from_its_checkpoint() -> None:
    runs = Runs()
    runs.fail[1] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        runs.sweep(*GRID)
    (Path("sweep/1/checkpoint")).mkdir()
    (Path("sweep/1/checkpoint") / "state").write_text("x")
    from fedtune.config.loader import load

    save_config(load(["privacy.epsilon=2"]), Path("sweep/1"))
    again = Runs()
    again.sweep("sweep.resume=sweep")
    assert [config.resume for config in again.made] == [str(Path.cwd() / "sweep" / "1"), None]


@pytest.mark.slow
def test_a_folder_with_a_sweep_is_not_swept_again(golden: Golden) -> None:
    Runs().sweep(*GRID)
    runs = Runs()
    with pytest.raises(ConfigError) as raised:
        runs.sweep(*GRID)
    assert "sweep.resume=sweep" in str(raised.value)
    golden(raised)
    assert runs.titles == []


def test_a_sweep_of_one_run() -> None:
    runs = Runs()
    runs.sweep("privacy.epsilon=2", "hydra.sweep.dir=sweep")
    assert runs.said[0].startswith("1 run in sweep") and len(runs.made) == 1


@pytest.mark.slow
def test_a_run_without_privacy_and_without_price() -> None:
    runs = Runs()
    runs.sweep("privacy=local,none", "hydra.sweep.dir=sweep")
    assert "no privacy" in runs.said[2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sweep.resum=x"], r"Did you mean sweep\.resume"),
        (["sweep.resume=x", "seed=1,2"], "cannot be given with it"),
        (["sweep.resume=x", "sweep.pruner=none"], "cannot be given with it"),
        (["sweep.private_selection=perhaps"], "true or false"),
        (["sweep.private_selection=true", "sweep.trials=0"], "1 or more"),
        (["sweep.private_selection=true", "sweep.trials=many"], "1 or more"),
        (["sweep.private_selection=true", "sweep.distribution=uniform"], "geometric"),
        (["sweep.distribution=poisson"], r"belongs to sweep\.private_selection=true"),
        (["sweep.trials=3", "sweep.trials=4"], "given twice"),
        (["sweep.private_selection"], "There is no option"),
    ],
)
def test_options_that_mean_nothing(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        split_options(words)


def test_options_are_taken_off_the_command_line() -> None:
    options, rest = split_options(
        ["seed=1,2", "sweep.private_selection=true", "sweep.trials=7", "sweep=epsilon"]
    )
    assert rest == ["seed=1,2", "sweep=epsilon"]
    assert options == SweepOptions(None, True, 7.0, "geometric")
    assert options.count(3) == TrialCount(7.0, 1.0) and SweepOptions().count(3).mean == 3.0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "not the folder"),
        ("{", "cannot be read"),
        ("[]", "should be an object"),
        ('{"schema": 9}', "reads schema 1"),
        ('{"schema": 1}', "damaged"),
        ('{"schema": 1, "overrides": ["seed=1"], "jobs": [["seed=1", 2]]}', r"jobs\[0\]\[1\] is 2"),
    ],
)
def test_folders_that_cannot_be_resumed(content: str | None, message: str) -> None:
    Path("x").mkdir()
    if content is not None:
        Path("x/sweep.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        Runs().sweep("sweep.resume=x")


@pytest.mark.parametrize(
    ("experiment", "count"),
    [
        ("privacy_frontier", 18),
        *(
            pytest.param(*page, marks=pytest.mark.slow)  # each composes as many configurations
            for page in (("quantization_frontier", 36), ("adapters", 20), ("trust", 18))
        ),
    ],
)
def test_ready_experiments_are_sweeps_of_known_size(
    experiment: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedtune.config.launch import is_sweep

    words = [f"experiment={experiment}", "hydra.sweep.dir=sweep"]
    assert is_sweep(words) and not is_sweep(["experiment=smoke"])
    monkeypatch.setattr(Sweep, "foresee", lambda self, configs, workers: _stop(len(configs)))
    with pytest.raises(KeyboardInterrupt, match=str(count)):
        Runs().sweep(*words)
    jobs = json.loads(Path("sweep/sweep.json").read_text())["jobs"]
    assert len({tuple(job) for job in jobs}) == count
    assert all("privacy=none" not in job or "epsilon" not in str(job) for job in jobs)


def _stop(total: int | None) -> str:
    raise KeyboardInterrupt(str(total))


def test_settings_without_meaning_do_not_multiply_runs() -> None:
    jobs = [[f"privacy={p}", f"privacy.epsilon={e}"] for p in ("local", "none") for e in (1, 2)]
    assert distinct_jobs(jobs) == [*jobs[:2], ["privacy=none"]]
    assert distinct_jobs([["adapter=head", "adapter.layers=2"], ["adapter=lora", "adapter.layers=2"]]) == [
        ["adapter=head"],
        ["adapter=lora", "adapter.layers=2"],
    ]


# --- private selection ---------------------------------------------------------------------------

RATES = ["train.learning_rate=0.001,0.002", "hydra.sweep.dir=sweep", "sweep.private_selection=true"]


@pytest.mark.slow
def test_number_and_settings_of_trials_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrialCount, "draw", lambda self: 16)
    monkeypatch.setattr(options.secrets, "choice", random.Random(5).choice)
    runs = Runs()
    runs.sweep(*RATES, "sweep.trials=20", "sweep.distribution=poisson")
    assert len(runs.made) == 16
    drawn = Counter(config.train.learning_rate for config in runs.made)
    assert set(drawn) == {0.001, 0.002}
    kept = json.loads(Path("sweep/sweep.json").read_text())["private_selection"]
    expected = {"mean": 20.0, "shape": None, "distribution": "Poisson", "trials": 16, "combinations": 2}
    assert kept == expected
    assert "Publish the best of them and nothing else" in runs.said[0]


@pytest.mark.slow
def test_resuming_keeps_what_was_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrialCount, "draw", lambda self: 4)
    runs = Runs()
    runs.fail[2] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        runs.sweep(*RATES)
    jobs = json.loads(Path("sweep/sweep.json").read_text())["jobs"]
    again = Runs()
    again.sweep("sweep.resume=sweep")
    assert json.loads(Path("sweep/sweep.json").read_text())["jobs"] == jobs
    rates = [config.train.learning_rate for config in runs.made + again.made]
    assert rates == [float(job[0].split("=")[1]) for job in jobs]


@pytest.mark.slow
def test_no_trial_may_be_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrialCount, "draw", lambda self: 0)
    runs = Runs()
    assert runs.sweep(*RATES, "sweep.distribution=poisson") == []
    assert runs.made == [] and runs.said[0].startswith("0 runs")


@pytest.mark.parametrize(
    "varied",
    [
        "privacy.epsilon=1,2",
        "train.sample_rate=0.1,0.2",
        "federation.num_rounds=2,3",
        "privacy=local,none",
        "data=opinions,files",
        "partition=iid,natural",
        "experiment=quick,smoke",
    ],
)
def test_trials_must_be_one_mechanism(varied: str, golden: Golden) -> None:
    runs = Runs()
    with pytest.raises(ConfigError) as raised:
        runs.sweep(varied, *RATES[1:])
    golden(raised)
    assert runs.titles == [] and not Path("sweep/sweep.json").exists()


@pytest.mark.slow
def test_what_leaves_the_mechanism_alone_may_vary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrialCount, "draw", lambda self: 2)
    runs = Runs()
    runs.sweep("privacy.max_grad_norm=0.5,1", "adapter=lora,head", "model.quantization=int8,nf4", *RATES[1:])
    assert len(runs.made) == 2
