"""`fedtune plan`: the cheapest that meets all constraints, or what to relax, checked by search."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest

from fedtune.config.loader import load, to_dict
from fedtune.errors import ConfigError
from fedtune.report.collect import collect
from fedtune.report.constraints import (
    CUTS,
    Constraints,
    answer,
    count_adoption,
    default_constraints,
    money_after,
    plan,
)
from fedtune.report.frontier import Point, flatten, points_of, price_book
from fedtune.report.words import repeat_command
from tests.support.golden import Golden
from tests.support.synthetic import make_record, write, write_grid


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_grid(
        folder,
        seeds=2,
        epsilon=[1.0, 2.0, 8.0, None],
        quantization=["none", "int8"],
        adapter=["lora", "head"],
    )
    return folder


@pytest.fixture(scope="module")
def points(root: Path) -> list[Point]:
    found = collect([root])
    return points_of(found.runs, price_book(found.runs, None))


def facts(point: Point) -> tuple[float, float, float]:
    assert point.accuracy is not None and point.costs["money"] is not None
    return point.accuracy.mean, point.epsilon, point.costs["money"].mean


ACCURACIES, EPSILONS, AMOUNTS = (0.5, 0.75, 0.79, 0.99), (0.1, 2.0, 8.0, math.inf), (0.001, 0.003, 0.008, 1.0)


@pytest.mark.parametrize("limits", itertools.product(ACCURACIES, EPSILONS, AMOUNTS))
def test_every_answer_is_what_a_search_finds(points: list[Point], limits: tuple[float, float, float]) -> None:
    accuracy, epsilon, money = limits
    result = answer(points, Constraints(accuracy, epsilon, money))
    rows = [facts(point) for point in points]
    good = [row for row in rows if row[0] >= accuracy and row[1] <= epsilon and row[2] <= money]
    if good:
        assert result.point is not None and facts(result.point)[2] == min(row[2] for row in good)
        return
    assert result.point is None
    single = {
        relaxation.names[0]: relaxation.values[0]
        for relaxation in result.relaxations
        if len(relaxation.names) == 1
    }
    best = {
        "accuracy": max((r[0] for r in rows if r[1] <= epsilon and r[2] <= money), default=None),
        "epsilon": min((r[1] for r in rows if r[0] >= accuracy and r[2] <= money), default=None),
        "money": min((r[2] for r in rows if r[0] >= accuracy and r[1] <= epsilon), default=None),
    }
    expected = {name: value for name, value in best.items() if value is not None}
    assert single == expected
    if not expected:
        assert result.relaxations and all(len(relaxation.names) > 1 for relaxation in result.relaxations)


def test_text_names_numbers_and_a_command(root: Path) -> None:
    text, values = plan([root], [], Constraints(0.7, 8.0, 1.0))
    assert "cheapest of 16 configurations" in text and "standard error over 2 runs" in text
    assert "at delta" in text and "add or remove one record" in text and "USD a run" in text
    assert "fedtune run -m" in text and values[0]["met"] is True
    json.dumps(values, allow_nan=False)


def test_text_says_which_constraint_to_relax_and_how_far(root: Path) -> None:
    text, (values,) = plan([root], [], Constraints(0.5, 8.0, 0.0005))
    assert "Relax one of these" in text and "money higher by" in text
    assert values["met"] is False and values["relaxations"][0]["constraints"].keys() == {"money"}


def test_epsilon_may_have_to_be_without_limit(points: list[Point]) -> None:
    best = max(facts(point)[0] for point in points if math.isinf(point.epsilon))
    result = answer(points, Constraints(best, 8.0))
    assert any(
        relaxation.names == ("epsilon",) and math.isinf(relaxation.values[0])
        for relaxation in result.relaxations
    )


@pytest.mark.parametrize(
    "limits", [(), (1.5,), (-0.1,), (None, -1.0), (None, math.nan), (None, None, -1.0), (math.nan,)]
)
def test_constraints_without_meaning(limits: tuple[float | None, ...]) -> None:
    with pytest.raises(ConfigError):
        Constraints(*limits)


def test_money_without_a_common_currency(tmp_path: Path, golden: Golden) -> None:
    for seed, currency in enumerate(("USD", "EUR")):
        made = make_record(seed=seed)
        made["cost"]["pricing"]["currency"] = currency
        write(tmp_path / str(seed), made)
    with pytest.raises(ConfigError) as raised:
        plan([tmp_path], [], Constraints(money=1.0))
    assert "--money" in str(raised.value)
    golden(raised)
    assert "fedtune run" in plan([tmp_path], [], Constraints(accuracy=0.5))[0]


def test_two_data_sets_get_two_answers(tmp_path: Path) -> None:
    write(tmp_path / "0", make_record())
    write(tmp_path / "1", make_record(dataset="tickets"))
    text, values = plan([tmp_path], [], Constraints(accuracy=0.5))
    assert [one["group"].split(",")[0] for one in values] == ["opinions", "tickets"] and "tickets" in text


# --- the command that repeats --------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["seed=3"],
        ["privacy.epsilon=2", "model.quantization=none", "adapter=ffa_lora"],
        ["privacy=none"],
        ["privacy.noise_multiplier=1.5"],
        ["data=files", "data.path='/some where/it\\'s'", "data.name='tickets, all'", "data.label=123"],
        ["data.labels=[negative,positive]", "adapter.layers=2", "federation.nodes=7", "partition=dirichlet"],
        ["data.name='null'", "data.subset='true'"],
    ],
)
def test_command_gives_the_same_configuration(overrides: list[str]) -> None:
    import shlex

    config = load(overrides)
    values = flatten(to_dict(config))
    words = shlex.split(repeat_command(values, [config.seed]))
    assert words[:2] == ["fedtune", "run"]
    again = load(words[2:])
    assert flatten(to_dict(again)) == values


def test_command_of_several_seeds_is_a_sweep() -> None:
    words = repeat_command(flatten(to_dict(load())), [0, 1, 2])
    assert words == "fedtune run -m seed=0,1,2"


# --- adoption ------------------------------------------------------------------------------------


def test_adoption_counts_by_hand(points: list[Point]) -> None:
    wanted = Constraints(0.7, 8.0, 0.006)
    counted = count_adoption(points, wanted)
    good = [point for point in points if facts(point)[0] >= 0.7 and point.epsilon <= 8.0]
    assert counted.good_enough == len(good) > 0
    for cut, by_price in zip(CUTS, counted.by_price, strict=True):
        assert by_price == sum(facts(point)[2] * (1 - cut) <= 0.006 for point in good)
    assert counted.by_price[0] < counted.by_price[-1], "the example shows something"
    assert list(counted.by_price) == sorted(counted.by_price)


def test_a_budget_equal_to_an_amount_includes_it(points: list[Point]) -> None:
    amount = min(facts(point)[2] for point in points)
    assert count_adoption(points, Constraints(0.0, math.inf, amount)).by_price[0] == 1


def test_unknown_parts_are_not_free(points: list[Point]) -> None:
    from fedtune.cost.prices import Money

    assert money_after(Money("USD", 1.0, None, 0.0, 0.0, None)) is None


def test_a_question_to_begin_with_shows_a_change(points: list[Point]) -> None:
    private = [point for point in points if math.isfinite(point.epsilon)]
    chosen = max(private, key=lambda point: facts(point)[0])
    wanted = default_constraints(points, chosen)
    assert wanted is not None and wanted.epsilon == chosen.epsilon and wanted.accuracy < facts(chosen)[0]
    counted = count_adoption(points, wanted)
    assert counted.good_enough > counted.by_price[0] and counted.by_price[-1] > 0
