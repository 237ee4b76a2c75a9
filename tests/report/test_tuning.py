"""Tuning is charged: one run's epsilon, all runs composed, and the best of a random number of trials."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from fedtune.privacy.accounting.epsilon import Term, epsilon_of_terms
from fedtune.privacy.accounting.filter import least_epsilon
from fedtune.report.collect import Collection, collect
from fedtune.report.tuning import composed_terms, describe_search, tuning_of
from tests.support.synthetic import DELTA, NOISE, ROUNDS, SAMPLE_RATE, STEPS, epsilon_for, make_record, write


def runs_in(root: Path, records: list[dict[str, Any]]) -> Collection:
    for i, made in enumerate(records):
        write(root / str(i), made)
    return collect([root])


def test_one_run_costs_what_it_says(tmp_path: Path) -> None:
    found = runs_in(tmp_path, [make_record()])
    tuning = tuning_of(found.runs, found.runs[0], {})
    assert tuning is not None and tuning.runs == 1
    assert tuning.epsilon_composed == tuning.epsilon_alone == epsilon_for(NOISE[8.0])


def test_all_runs_compose_as_the_accountant_composes_them(tmp_path: Path) -> None:
    found = runs_in(tmp_path, [make_record(seed=s, epsilon=e) for s in range(3) for e in (1.0, 8.0)])
    chosen = max(found.runs, key=lambda run: run.accuracy or 0)
    tuning = tuning_of(found.runs, chosen, {})
    steps = 3 * STEPS * ROUNDS
    by_hand = {Term(SAMPLE_RATE, NOISE[1.0]): steps, Term(SAMPLE_RATE, NOISE[8.0]): steps}
    assert tuning is not None and tuning.runs == 6
    # Several runs are counted as the ledgers count them: by Renyi DP, and not by what holds for one plan.
    assert math.isclose(tuning.epsilon_composed, least_epsilon(by_hand, DELTA), rel_tol=1e-9)
    assert tuning.epsilon_alone < epsilon_of_terms(by_hand, DELTA) < tuning.epsilon_composed


def test_a_record_is_charged_on_its_own_node_under_the_natural_partition(tmp_path: Path) -> None:
    one, other = make_record(seed=0), make_record(seed=1)
    one["privacy"]["per_node"] = one["privacy"]["per_node"][:2]
    other["privacy"]["per_node"] = other["privacy"]["per_node"][2:]
    found = runs_in(tmp_path, [one, other])
    tuning = tuning_of(found.runs, found.runs[0], {})
    assert tuning is not None and tuning.epsilon_composed == tuning.epsilon_alone, (
        "disjoint nodes: no record was used twice"
    )
    assert set(composed_terms(found.runs)) == {"editorials", "movies", "products", "tweets"}


def test_a_record_may_have_been_anywhere_under_another_partition(tmp_path: Path) -> None:
    records = []
    for seed in range(2):
        made = make_record(seed=seed, partition__name="iid")
        made["privacy"]["per_node"] = made["privacy"]["per_node"][2 * seed : 2 * seed + 2]
        records.append(made)
    found = runs_in(tmp_path, records)
    tuning = tuning_of(found.runs, found.runs[0], {})
    assert tuning is not None
    twice = least_epsilon({Term(SAMPLE_RATE, NOISE[8.0]): 2 * STEPS * ROUNDS}, DELTA)
    assert math.isclose(tuning.epsilon_composed, twice, rel_tol=1e-9)


def test_other_data_and_other_units_are_not_added(tmp_path: Path) -> None:
    found = runs_in(
        tmp_path, [make_record(), make_record(dataset="tickets"), make_record(seed=1, unit="person")]
    )
    chosen = next(run for run in found.runs if run.unit == "record" and run.task.startswith("opinions"))
    tuning = tuning_of(found.runs, chosen, {})
    assert tuning is not None and tuning.runs == 1 and tuning.epsilon_composed == tuning.epsilon_alone


def test_runs_without_privacy_are_counted_and_have_no_epsilon(tmp_path: Path) -> None:
    found = runs_in(tmp_path, [make_record(), make_record(epsilon=None)])
    private = next(run for run in found.runs if math.isfinite(run.epsilon))
    tuning = tuning_of(found.runs, private, {})
    assert tuning is not None and tuning.without_privacy == 1 and tuning.runs == 1
    assert tuning_of(found.runs, next(run for run in found.runs if run is not private), {}) is None


@pytest.mark.parametrize("public", [True, False])
def test_public_data_is_labelled(tmp_path: Path, public: bool) -> None:
    found = runs_in(tmp_path, [make_record(public=public)])
    tuning = tuning_of(found.runs, found.runs[0], {})
    assert tuning is not None and tuning.public is public


def test_the_best_of_a_drawn_number_of_trials(tmp_path: Path) -> None:
    sweep = {"private_selection": {"mean": 10.0, "shape": 1.0, "trials": 4}}
    records = [make_record(train__learning_rate=rate) for rate in (0.001, 0.002, 0.004, 0.008)]
    for made in records:
        made["run"]["id"] += "x"
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.json").write_text(json.dumps(sweep))
    found = runs_in(tmp_path / "sweep", records)
    best = max(found.runs, key=lambda run: run.accuracy or 0)
    tuning = tuning_of(found.runs, best, found.sweeps)
    assert tuning is not None and tuning.epsilon_best is not None and tuning.trials is not None
    assert tuning.epsilon_alone < tuning.epsilon_best and tuning.trials.mean == 10.0
    worst = min(found.runs, key=lambda run: run.accuracy or 0)
    other = tuning_of(found.runs, worst, found.sweeps)
    assert other is not None and other.epsilon_best is None, "the bound is for the best of the sweep alone"


@pytest.mark.parametrize(
    "broken", [{}, {"mean": "x"}, {"mean": 0.1, "shape": 1.0}, {"mean": 3.0, "shape": -7}]
)
def test_a_sweep_file_without_sense_gives_no_bound(tmp_path: Path, broken: dict[str, Any]) -> None:
    (tmp_path / "sweep.json").write_text(json.dumps({"private_selection": broken}))
    found = runs_in(tmp_path, [make_record()])
    tuning = tuning_of(found.runs, found.runs[0], found.sweeps)
    assert tuning is not None and tuning.epsilon_best is None


def searched(root: Path, axes: list[str], made: list[dict[str, Any]]) -> Collection:
    """Runs of a search over `axes`, in a folder as it leaves it."""
    root.mkdir(exist_ok=True)
    kept = {"search": {"objectives": ["accuracy"], "identity": {"searched": axes}}}
    (root / "sweep.json").write_text(json.dumps(kept))
    return runs_in(root, made)


def test_runs_that_a_search_chose_are_labelled(tmp_path: Path) -> None:
    records = [make_record(train__learning_rate=rate) for rate in (0.001, 0.002, 0.004)]
    found = searched(tmp_path, ["train.learning_rate=0.001 to 0.1 (log)"], records)
    tuning = tuning_of(found.runs, found.runs[0], found.sweeps)
    assert (
        tuning is not None and tuning.searched == 3 and tuning.pruned == 0 and tuning.searched_mechanism == ()
    )
    assert tuning.epsilon_best is None and tuning.epsilon_composed > tuning.epsilon_alone
    text = describe_search(tuning)
    assert text.startswith("These runs were chosen by a search") and "Feldman" not in text
    grid = runs_in(tmp_path / "grid", [make_record()])
    one = tuning_of(grid.runs, grid.runs[0], grid.sweeps)
    assert one is not None and one.searched == 0 and describe_search(one) == ""


def test_a_search_that_chose_privacy_or_ended_runs_says_what_is_proven(tmp_path: Path) -> None:
    records = [make_record(epsilon=epsilon) for epsilon in (1.0, 2.0, 8.0)]
    records[2]["run"]["status"] = "pruned"
    axes = ["privacy.epsilon=0.5 to 8", "privacy.max_grad_norm=0.1 to 1", "federation.num_rounds=4 to 9"]
    found = searched(tmp_path / "search", axes, records)
    write(tmp_path / "other", make_record(seed=5))
    both = collect([tmp_path])
    chosen = max((run for run in found.runs if not run.pruned), key=lambda run: run.accuracy or 0)
    tuning = tuning_of(both.runs, chosen, both.sweeps)
    assert tuning is not None and (tuning.runs, tuning.searched, tuning.pruned) == (4, 3, 1)
    assert tuning.searched_mechanism == ("privacy.epsilon", "federation.num_rounds"), (
        "the norm costs no privacy"
    )
    text = describe_search(tuning)
    assert text.startswith("3 of these 4 runs") and "ended 1 of them early" in text
    assert (
        "chose privacy.epsilon, federation.num_rounds" in text
        and "proven for what was planned together" in text
    )


@pytest.mark.parametrize(
    "kept", [{"search": None}, {"search": {}}, {"search": {"identity": {"searched": 3}}}]
)
def test_a_search_file_without_sense_costs_the_label_only(tmp_path: Path, kept: dict[str, Any]) -> None:
    (tmp_path / "sweep.json").write_text(json.dumps(kept))
    found = runs_in(tmp_path, [make_record()])
    tuning = tuning_of(found.runs, found.runs[0], found.sweeps)
    assert tuning is not None and tuning.searched_mechanism == ()
