"""Records to points: what is read, grouped, left out with a word, and which points no other one dominates."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.errors import ConfigError, RecordError
from fedtune.report.collect import Collection, collect
from fedtune.report.frontier import (
    Point,
    Stat,
    non_dominated,
    parse_prices,
    points_of,
    price_book,
    varied_settings,
)
from tests.support.golden import Golden
from tests.support.synthetic import PRICING, make_record, write, write_grid


def points(root: Path, *prices: str) -> list[Point]:
    found = collect([root])
    return points_of(found.runs, price_book(found.runs, parse_prices(prices)))


def notes(found: Collection) -> str:
    return "\n".join(found.notes)


# --- reading -------------------------------------------------------------------------------------


def test_all_records_below_are_read(tmp_path: Path) -> None:
    count = write_grid(tmp_path / "deep" / "er", seeds=2, epsilon=[1.0, 8.0])
    found = collect([tmp_path])
    assert len(found.runs) == count == 4
    assert found.notes == []


def test_a_record_is_read_once_however_often_it_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a" / "b", make_record())
    write(tmp_path / "copy", make_record())
    found = collect([tmp_path, tmp_path / "a", path])
    assert len(found.runs) == 1
    assert "1 further copies" in notes(found)


def test_bad_records_are_named_and_the_others_stay(tmp_path: Path) -> None:
    good = make_record()
    write(tmp_path / "good", good)
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "record.json").write_text(json.dumps(good)[:1000])
    write(tmp_path / "old", make_record(seed=1) | {"schema": 0})
    found = collect([tmp_path])
    assert [run.path.parent.name for run in found.runs] == ["good"]
    said = notes(found)
    assert "2 records could not be used" in said
    assert "half-written" in said and "schema 0" in said and "reads schema 1" in said


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("metrics", "accuracy", "good"),
        ("metrics", "per_site", [1]),
        ("metrics", "by_round", [{"accuracy": 1}]),
        ("privacy", "per_node", [{}]),
        ("privacy", "epsilon", "two"),
        ("cost", "flops", "many"),
        ("run", "seed", None),
        ("config", "data", None),
    ],
)
def test_values_without_sense_are_refused(tmp_path: Path, section: str, key: str, value: Any) -> None:
    broken = make_record()
    broken[section][key] = value
    write(tmp_path / "broken", broken)
    with pytest.raises(RecordError, match=r"None of the records .* (should be|lacks)"):
        collect([tmp_path])


def test_empty_and_missing_folders(tmp_path: Path, golden: Golden) -> None:
    with pytest.raises(RecordError) as raised:
        collect([tmp_path])
    assert "record.json" in str(raised.value)
    golden(raised)
    with pytest.raises(RecordError) as raised:
        collect([tmp_path / "nowhere"])
    golden(raised)


def test_only_unfinished_runs(tmp_path: Path, golden: Golden) -> None:
    (tmp_path / "0" / "checkpoint").mkdir(parents=True)
    (tmp_path / "0" / "config.yaml").write_text("seed: 1\n")
    with pytest.raises(RecordError) as raised:
        collect([tmp_path])
    assert "resume=" in str(raised.value)
    golden(raised)
    write(tmp_path / "1", make_record())
    assert "1 run is not finished" in notes(collect([tmp_path]))


def test_failed_runs_of_a_sweep_are_told_with_their_error(tmp_path: Path) -> None:
    write(tmp_path / "0", make_record())
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "failure.json").write_text(json.dumps({"error": "BudgetExhausted: no more"}))
    (tmp_path / "2").mkdir()
    (tmp_path / "2" / "failure.json").write_text("{")
    said = notes(collect([tmp_path]))
    assert "2 runs failed" in said and "BudgetExhausted: no more" in said and "cannot be read" in said


def test_many_problems_are_counted_and_three_are_shown(tmp_path: Path) -> None:
    write(tmp_path / "good", make_record())
    for i in range(50):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "record.json").write_text("{")
    (note,) = collect([tmp_path]).notes
    assert note.startswith("50 records could not be used") and "and 47 more" in note
    assert len(note) < 1500


def test_adapters_and_checkpoints_are_not_searched(tmp_path: Path) -> None:
    write(tmp_path / "run", make_record())
    write(tmp_path / "run" / "checkpoint" / "x", make_record(seed=5))
    assert len(collect([tmp_path]).runs) == 1


# --- grouping ------------------------------------------------------------------------------------


def test_seeds_are_one_point_with_mean_and_standard_error(tmp_path: Path) -> None:
    for seed, accuracy in enumerate((0.70, 0.72, 0.77)):
        write(tmp_path / str(seed), make_record(seed=seed, accuracy=accuracy))
    (point,) = points(tmp_path)
    assert point.seeds == [0, 1, 2]
    assert point.accuracy is not None and math.isclose(point.accuracy.mean, 0.73)
    assert math.isclose(point.accuracy.error or 0, np.std([0.70, 0.72, 0.77], ddof=1) / math.sqrt(3))


def test_a_single_seed_has_no_error(tmp_path: Path) -> None:
    write(tmp_path, make_record())
    (point,) = points(tmp_path)
    assert point.accuracy is not None and point.accuracy.error is None


def test_prices_and_folders_do_not_make_another_configuration(tmp_path: Path) -> None:
    write(tmp_path / "0", make_record(seed=0))
    other = make_record(seed=1)
    other["config"]["output"] = "/elsewhere"
    other["config"]["pricing"]["device_hour"] = 7.0
    write(tmp_path / "1", other)
    assert len(points(tmp_path)) == 1


def test_epsilon_of_a_point_is_the_largest_of_its_seeds_and_never_their_mean(tmp_path: Path) -> None:
    for seed, epsilon in enumerate((7.0, 7.9)):
        made = make_record(seed=seed)
        made["privacy"]["epsilon"] = epsilon
        write(tmp_path / str(seed), made)
    (point,) = points(tmp_path)
    assert point.epsilon == 7.9


def test_unknown_epsilon_counts_as_none_at_all(tmp_path: Path) -> None:
    made = make_record()
    made["privacy"]["epsilon"] = None
    write(tmp_path, made)
    assert points(tmp_path)[0].epsilon == math.inf


def test_what_varies_is_found(tmp_path: Path) -> None:
    write_grid(tmp_path, seeds=1, epsilon=[1.0, 8.0], quantization=["int8", "nf4"])
    assert varied_settings(points(tmp_path)) == ["model.quantization", "privacy.epsilon"]


def test_two_data_sets_are_not_compared(tmp_path: Path) -> None:
    write(tmp_path / "0", make_record(accuracy=0.9))
    write(tmp_path / "1", make_record(accuracy=0.6, dataset="tickets"))
    made = points(tmp_path)
    assert len({point.group for point in made}) == 2
    assert all(point.best["epsilon"] for point in made), "neither dominates the other"


def test_two_units_are_not_compared(tmp_path: Path) -> None:
    write(tmp_path / "0", make_record(accuracy=0.9))
    write(tmp_path / "1", make_record(accuracy=0.6, unit="person"))
    assert all(point.best["epsilon"] for point in points(tmp_path))


# --- non-dominated -------------------------------------------------------------------------------


def slow_non_dominated(values: np.ndarray) -> list[bool]:
    """By the definition, pair by pair."""
    return [
        not any(all(b <= a) and any(b < a) for j, b in enumerate(values) if j != i)
        for i, a in enumerate(values)
    ]


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("seed", range(5))
def test_non_dominated_is_its_definition(dimensions: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    values = random.integers(0, 6, size=(60, dimensions)).astype(float)  # many ties
    values[random.random(values.shape) < 0.05] = np.inf
    assert non_dominated(values).tolist() == slow_non_dominated(values)


def test_accuracies_are_compared_over_the_seeds_that_all_have(tmp_path: Path) -> None:
    """A lucky third seed of the larger epsilon alone must not make the smaller one dominated."""
    rows = [(1.0, 0, 0.80), (1.0, 1, 0.80), (8.0, 0, 0.79), (8.0, 1, 0.79), (8.0, 2, 0.99)]
    for number, (epsilon, seed, accuracy) in enumerate(rows):
        write(tmp_path / str(number), make_record(epsilon=epsilon, seed=seed, accuracy=accuracy))
    less, more = sorted(points(tmp_path), key=lambda point: point.epsilon)
    assert more.accuracy is not None and more.accuracy.mean > 0.85
    assert less.best["epsilon"] and not more.best["epsilon"]


def test_equal_points_do_not_dominate_each_other() -> None:
    assert non_dominated(np.ones((3, 2))).tolist() == [True] * 3
    assert non_dominated(np.zeros((0, 2))).tolist() == []


def test_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        non_dominated(np.array([[np.nan, 1.0]]))


def test_marks_by_hand(tmp_path: Path) -> None:
    for i, (epsilon, accuracy) in enumerate([(1.0, 0.7), (2.0, 0.69), (4.0, 0.8), (None, 0.8)]):
        write(tmp_path / str(i), make_record(epsilon=epsilon, accuracy=accuracy))
    by_epsilon = sorted(points(tmp_path), key=lambda point: point.epsilon)
    assert [point.best["epsilon"] for point in by_epsilon] == [True, False, True, False]


def test_a_missing_cost_is_no_cost_of_nothing(tmp_path: Path) -> None:
    dear, unknown = make_record(accuracy=0.8), make_record(accuracy=0.8, adapter="head")
    unknown["cost"]["energy_kwh"] = None
    write(tmp_path / "0", dear)
    write(tmp_path / "1", unknown)
    made = {point.settings["adapter.name"]: point for point in points(tmp_path)}
    assert made["head"].costs["energy_kwh"] is None
    assert made["lora"].best["energy_kwh"] and not made["head"].best["energy_kwh"]


def test_runs_without_accuracy_are_kept_and_never_best(tmp_path: Path) -> None:
    made = make_record(adapter="head")
    made["metrics"]["accuracy"] = None
    write(tmp_path / "0", made)
    write(tmp_path / "1", make_record())
    by_adapter = {point.settings["adapter.name"]: point for point in points(tmp_path)}
    assert by_adapter["head"].accuracy is None and not any(by_adapter["head"].best.values())


def test_a_mean_with_an_unknown_part_is_unknown() -> None:
    assert Stat.of([1.0, None]) is None and Stat.of([]) is None
    assert Stat.of([2.0]) == Stat(2.0, None, (2.0,))


# --- prices --------------------------------------------------------------------------------------


def test_repricing_is_usage_times_price(tmp_path: Path) -> None:
    made = make_record()
    write(tmp_path, made)
    (own,), (edge,) = points(tmp_path), points(tmp_path, "pricing=edge")
    assert own.costs["money"] is not None and edge.costs["money"] is not None
    assert math.isclose(own.costs["money"].mean, made["cost"]["money"]["total"])
    moved, energy = made["cost"]["bytes_up"], made["cost"]["energy_kwh"]
    assert math.isclose(edge.costs["money"].mean, 2 * moved * 2.0 / 1e9 + 0.30 * energy)


def test_one_price_can_be_set(tmp_path: Path) -> None:
    write(tmp_path, make_record())
    (point,) = points(tmp_path, "pricing=free", "pricing.device_hour=36")
    assert point.costs["money"] is not None and point.costs["train_seconds"] is not None
    assert math.isclose(point.costs["money"].mean, point.costs["train_seconds"].mean * 0.01)


def test_two_currencies_make_no_money(tmp_path: Path) -> None:
    euros = copy.copy(PRICING)
    euros.currency = "EUR"
    write(tmp_path / "0", make_record())
    write(tmp_path / "1", make_record(seed=1, pricing=euros))
    found = collect([tmp_path])
    using = price_book(found.runs, None)
    assert using.currency is None and "EUR, USD" in using.notes[0] and "pricing=NAME" in using.notes[0]
    assert all(point.costs["money"] is None for point in points_of(found.runs, using))
    (point,) = points(tmp_path, "pricing=cloud_cpu")
    assert point.costs["money"] is not None, "one book for both makes them comparable"


def test_an_unknown_currency_of_a_record_is_said_and_a_known_book_prices_it(tmp_path: Path) -> None:
    coins = dataclasses.replace(PRICING, currency="coins")
    write(tmp_path, make_record(pricing=coins))
    found = collect([tmp_path])
    using = price_book(found.runs, None)
    assert using.currency == "coins" and any("'coins'" in note and "ISO 4217" in note for note in using.notes)
    assert not any(
        "ISO 4217" in note for note in price_book(found.runs, parse_prices(["pricing=cloud_cpu"])).notes
    )


def test_a_missing_price_is_no_price_of_nothing(tmp_path: Path) -> None:
    made = make_record()
    made["cost"]["pricing"]["device_hour"] = None
    write(tmp_path, made)
    assert points(tmp_path)[0].costs["money"] is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pricing=nope"], "cloud_cpu"),
        (["pricing.currency=coins"], "ISO 4217"),
        (["pricing.device_hour=-1"], "0 or more"),
        (["seed=1"], "only prices"),
    ],
)
def test_books_that_mean_nothing(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_prices(words)


def test_no_book_asked_for() -> None:
    assert parse_prices([]) is None
