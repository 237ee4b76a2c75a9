"""The paragraph of the report: follows its own rule, says its numbers, and doubts where it should."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedtune.report.advice import Advice, advise, family
from fedtune.report.collect import collect
from fedtune.report.frontier import Point, named_settings, points_of, price_book, varied_settings
from tests.support.synthetic import make_record, write


def points(root: Path, rows: list[dict[str, Any]]) -> list[Point]:
    for i, row in enumerate(rows):
        write(root / str(i), make_record(**row))
    found = collect([root])
    return points_of(found.runs, price_book(found.runs, None))


def advice(root: Path, rows: list[dict[str, Any]]) -> Advice:
    made = points(root, rows)
    return advise(made, named_settings(varied_settings(made), made), "USD")


def seeds(accuracies: tuple[float, ...], **row: Any) -> list[dict[str, Any]]:
    return [{"seed": seed, "accuracy": value, **row} for seed, value in enumerate(accuracies)]


def test_the_smallest_epsilon_within_reach_of_the_best_is_chosen(tmp_path: Path) -> None:
    rows = [
        *seeds((0.700, 0.701, 0.702), epsilon=1.0),
        *seeds((0.797, 0.798, 0.799), epsilon=2.0),
        *seeds((0.800, 0.801, 0.802), epsilon=8.0),
    ]
    said = advice(tmp_path, rows)
    assert said.chosen is not None and said.chosen.settings["privacy.epsilon"] == 2.0
    assert "Choose epsilon 1.96" in said.text and "79.8 ± 0.1 percent" in said.text
    assert (
        "0.3 ± 0.0 points better over 3 common seeds" in said.text and "costs 9.7 ± 0.0 points" in said.text
    )
    assert (
        "add or remove one record" in said.text and "delta 5.6e-05" in said.text and "USD a run" in said.text
    )
    assert said.caveats == ()


def test_a_gain_beyond_reach_is_worth_its_epsilon(tmp_path: Path) -> None:
    rows = [*seeds((0.70, 0.701), epsilon=2.0), *seeds((0.80, 0.801), epsilon=8.0)]
    said = advice(tmp_path, rows)
    assert said.chosen is not None and said.chosen.settings["privacy.epsilon"] == 8.0


def test_noise_between_seeds_does_not_buy_any_accuracy_away(tmp_path: Path) -> None:
    """However wide the errors are, more than two points are never given away for a smaller epsilon."""
    rows = [*seeds((0.70, 0.80), epsilon=1.0), *seeds((0.73, 0.83), epsilon=8.0)]
    said = advice(tmp_path, rows)
    assert said.chosen is not None and said.chosen.settings["privacy.epsilon"] == 8.0


def test_among_equals_the_cheapest(tmp_path: Path) -> None:
    rows = [
        *seeds((0.80, 0.80), quantization="none"),
        *seeds((0.799, 0.799), quantization="int8"),
    ]
    said = advice(tmp_path, rows)
    assert said.chosen is not None and said.chosen.settings["model.quantization"] == "int8"
    assert "quantization=int8" in said.text


def test_what_privacy_costs_is_said_against_the_same_configuration(tmp_path: Path) -> None:
    rows = [
        *seeds((0.80, 0.80), epsilon=2.0),
        *seeds((0.83, 0.83), epsilon=None),
        *seeds((0.99, 0.99), epsilon=None, quantization="none"),
    ]
    said = advice(tmp_path, rows)
    assert "privacy costs 3.0 ± 0.0 points" in said.text
    assert [point.epsilon for point in said.family] == sorted(point.epsilon for point in said.family)
    assert len(said.family) == 2, "the family differs in epsilon alone"


def test_the_site_that_pays_is_named(tmp_path: Path) -> None:
    said = advice(tmp_path, [*seeds((0.80, 0.80), epsilon=1.0), *seeds((0.83, 0.83), epsilon=None)])
    assert "editorials has" in said.text and "editorials loses most by privacy" in said.text


def test_single_seeds_are_doubted(tmp_path: Path) -> None:
    said = advice(tmp_path, [{"epsilon": 1.0}, {"epsilon": 8.0}])
    assert "2 of 2 private configurations were run with one seed" in said.caveats[0]


def test_accuracy_that_falls_with_epsilon_is_doubted(tmp_path: Path) -> None:
    rows = [*seeds((0.80, 0.801), epsilon=1.0), *seeds((0.75, 0.751), epsilon=8.0)]
    (doubt,) = advice(tmp_path, rows).caveats
    assert "falls by 5.0 ± 0.0 points from epsilon 0.91 to 7.13" in doubt


def test_a_fall_within_two_standard_errors_is_luck(tmp_path: Path) -> None:
    rows = [*seeds((0.78, 0.80), epsilon=1.0), *seeds((0.77, 0.80), epsilon=8.0)]
    assert advice(tmp_path, rows).caveats == ()


def test_what_every_seed_says_is_no_noise_however_much_the_seeds_differ(tmp_path: Path) -> None:
    """Errors of 1.8 points each hide a difference of 1.0 that each of five seeds shows, unless paired."""
    rows = [
        *seeds((0.70, 0.72, 0.75, 0.78, 0.80), epsilon=1.0),
        *seeds((0.711, 0.729, 0.761, 0.790, 0.809), epsilon=8.0),
    ]
    said = advice(tmp_path, rows)
    assert said.chosen is not None and said.chosen.settings["privacy.epsilon"] == 8.0
    assert "costs 1.0 ± 0.0 points over 5 common seeds" in said.text


def test_seeds_that_one_of_two_lacks_do_not_count(tmp_path: Path) -> None:
    rows = [*seeds((0.80, 0.80, 0.20), epsilon=1.0), *seeds((0.801, 0.801), epsilon=8.0)]
    said = advice(tmp_path, rows)
    assert said.chosen is not None and said.chosen.settings["privacy.epsilon"] == 1.0
    assert "0.1 ± 0.0 points better over 2 common seeds" in said.text


def test_a_site_that_took_no_part_is_named_and_not_compared(tmp_path: Path) -> None:
    refused = {"editorials": "BudgetExhausted: no"}
    rows = [*seeds((0.80, 0.80), epsilon=1.0, left_out=refused), *seeds((0.803, 0.803), epsilon=8.0)]
    said = advice(tmp_path, rows)
    assert said.chosen is not None and said.chosen.settings["privacy.epsilon"] == 1.0
    assert said.caveats[0].startswith("editorials took no part in 2 of 2 runs of the recommended one")
    assert "editorials has" not in said.text and "tweets has" in said.text


def test_without_privacy_there_is_nothing_to_weigh(tmp_path: Path) -> None:
    said = advice(tmp_path, [{"epsilon": None}, {"epsilon": None, "quantization": "nf4"}])
    assert said.chosen is None and "None of these runs has privacy" in said.text


def test_one_run(tmp_path: Path) -> None:
    said = advice(tmp_path, [{}])
    assert said.chosen is not None and "Choose epsilon 7.13:" in said.text


def test_nothing_measured(tmp_path: Path) -> None:
    made = make_record()
    made["metrics"]["accuracy"] = None
    write(tmp_path / "0", made)
    found = collect([tmp_path])
    said = advise(points_of(found.runs, price_book(found.runs, None)), [], None)
    assert said.chosen is None and "nothing can be recommended" in said.text


def test_a_family_keeps_trust_models_apart(tmp_path: Path) -> None:
    made = points(
        tmp_path,
        [{"epsilon": 1.0}, {"epsilon": 8.0}, {"epsilon": 8.0, "trust": "distributed"}, {"epsilon": None}],
    )
    local = next(point for point in made if point.runs[0].trust == "local")
    assert [point.runs[0].trust for point in family(local, made)] == ["local", "local", "none"]
